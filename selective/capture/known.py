def lookup(base, group):
    return None
