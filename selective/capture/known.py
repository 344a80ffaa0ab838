from selective.capture.anatomy_facts import Anatomy
def lookup(base, group): return None
