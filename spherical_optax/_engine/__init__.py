"""The engine: builds transformations of trees from steps that are written for one group.

A step gives the new values of one group as linear combinations of a few vectors. The engine
handles trees, joint groups, blocks, dtypes and devices.
"""
