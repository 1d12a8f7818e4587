"""What it takes to draw many images: which ones, into what files, from what seeds, and what of it is done already."""
