"""The jobs: Ray Data, Ray Train and Ray Tune around the functions of `safetydpo`. The only package that imports ray."""
