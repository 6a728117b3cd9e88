"""The engine: transformations of trees made of steps that are written for one group.

A step says what becomes of one group, as combinations of a few vectors. The engine knows of
trees, joint groups, blocks, dtypes and devices, so that steps need not.
"""
