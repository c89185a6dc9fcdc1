"""Architectures of video diffusion, one per file.

The file name is the registry: a pipeline whose transformer/config.json names an
`XyTransformer3DModel` is read by xy.py, which holds one subclass of
`distill_bench.teachers.architecture.Architecture`. Use wan.py as a template.
"""
