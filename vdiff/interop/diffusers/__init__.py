"""Import and export of diffusers' pipeline folders; diffusers itself is not needed."""
