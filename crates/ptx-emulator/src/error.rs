//! What can go wrong: text that is no PTX, a launch that makes no sense, a kernel with a bug.

use std::fmt;

/// Why a module was not loaded, a launch refused, or a kernel stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The text is not PTX that this emulator knows.
    Parse {
        /// Line of the text, from 1.
        line: u32,
        /// The statement as it stands there.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A launch or a host access to device memory makes no sense; nothing ran.
    Request(String),
    /// A kernel did what a correct kernel never does; it was stopped there.
    Fault(Box<Fault>),
}

/// A bug in a kernel and the place where it showed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fault {
    /// Which kind of bug.
    pub hazard: Hazard,
    /// Entry point.
    pub kernel: String,
    /// Line in the PTX text, from 1.
    pub line: u32,
    /// The instruction as it stands there.
    pub text: String,
    /// Index of the CTA in the grid.
    pub cta: [u32; 3],
    /// Index of the thread in its CTA.
    pub thread: [u32; 3],
    /// What happened, with addresses and the other party where there is one.
    pub message: String,
}

/// The kinds of bug that the emulator finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Hazard {
    /// An access outside every allocation, or past the end of shared, local, const or param space.
    OutOfBounds,
    /// An address that is not a multiple of the access size.
    Misaligned,
    /// A read of memory that nothing wrote.
    Uninitialised,
    /// Two accesses, one a write, that nothing orders.
    Race,
    /// Threads that must execute one instruction together stand at different ones.
    NotConverged,
    /// A lane mask without the executing lane, or with lanes that can never come; a read from a lane
    /// that takes no part.
    LaneMask,
    /// A barrier used with other thread counts than it was begun with, or a count that cannot be.
    Arrival,
    /// Nothing can run and threads are left.
    Deadlock,
    /// Shared memory or a result used while an asynchronous copy still owns it.
    Async,
    /// Shared memory of another CTA of the cluster used where that CTA may not have begun, or may have
    /// ended.
    Peer,
    /// The kernel stopped itself.
    Trap,
    /// Operands that the instruction does not take.
    Operand,
    /// The step limit of the launch was reached.
    Endless,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Parse { line, text, reason } => write!(f, "line {line}: {reason}: `{text}`"),
            Self::Request(reason) => f.write_str(reason),
            Self::Fault(fault) => fault.fmt(f),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { hazard, kernel, line, text, cta, thread, message } = self;
        write!(f, "{hazard:?} in {kernel}, line {line}: `{text}`, CTA {cta:?}, thread {thread:?}: {message}")
    }
}

impl std::error::Error for Error {}

/// A fault before anybody added where it happened.
#[derive(Debug)]
pub(crate) struct Stop {
    pub(crate) hazard: Hazard,
    /// The lane it happened to.
    pub(crate) lane: u32,
    pub(crate) message: String,
}

impl Stop {
    pub(crate) fn new(hazard: Hazard, lane: u32, message: impl Into<String>) -> Self {
        Self { hazard, lane, message: message.into() }
    }
}
