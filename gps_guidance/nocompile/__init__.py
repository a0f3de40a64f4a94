"""Run an untouched threestudio without compiling: ``python -m gps_guidance.nocompile.start``.

Packages that only exist as CUDA sources (tinycudann, nvdiffrast, nerfacc's kernels) are replaced in
the running process by pure-torch stand-ins where they are missing; no file of threestudio's is
changed. ``launch.py --engine threestudio --threestudio FOLDER`` starts it.
"""
