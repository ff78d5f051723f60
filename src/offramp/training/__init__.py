"""How exits are trained and calibrated."""
