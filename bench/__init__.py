"""Measurements: sparse kernels against every dense and sparse path a user could pick instead."""
