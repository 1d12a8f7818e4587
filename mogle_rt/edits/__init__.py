"""Draw a region of an image anew, and keep the rest."""
