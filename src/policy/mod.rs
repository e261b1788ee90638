//! Policies: what to keep.
