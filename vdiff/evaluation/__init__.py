"""Measuring the quality of samples."""
