//! CUDA kernels and their drivers.
