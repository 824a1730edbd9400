"""Methods that train functions of fewer parameters (the survey's reparameterization-based family)."""
