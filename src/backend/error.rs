/// What can go wrong in a backend.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// Memory that the machine did not give.
    #[error("out of memory: {bytes} bytes for {what} could not be had")]
    OutOfMemory {
        /// What it was for.
        what: &'static str,
        /// How much.
        bytes: usize,
    },
    /// Operands that do not fit each other.
    #[error("{operation}: {problem}")]
    Shape {
        /// The operation.
        operation: &'static str,
        /// What does not fit, with the numbers.
        problem: String,
    },
    /// A kernel or a device that failed.
    #[error(transparent)]
    Device(#[from] crate::kernels::Error),
    /// The thread pool could not be made.
    #[error("{threads} worker threads could not be started: {reason}")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// What the system said.
        reason: String,
    },
}
