"""Each method against its formula, its paper's counts, and PEFT where that is right."""
