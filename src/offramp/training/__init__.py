"""How exits are trained, tuned for and calibrated."""
