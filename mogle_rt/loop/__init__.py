"""The denoising loop: schedule, steps over fixed buffers, CUDA graphs."""
