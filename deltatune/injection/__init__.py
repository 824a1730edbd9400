"""HOW a patch reaches its site: slots, acts, and the verbs attach, detach, merge, compose."""
