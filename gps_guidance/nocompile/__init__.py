"""Run an untouched threestudio without compiling anything: ``python -m gps_guidance.nocompile``.

Packages that only exist as CUDA sources (tinycudann, nvdiffrast, nerfacc's kernels) are replaced in
the running process by pure-torch stand-ins where they are missing; no file of threestudio's is
changed. ``launch.py --engine threestudio --threestudio FOLDER`` starts it.
"""
