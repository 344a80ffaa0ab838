"""State: what the wrapper keeps of each parameter, beside what the base keeps."""
