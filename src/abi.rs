//! Parameter structs shared with the kernels.
