//! How long prompts take, and how long they would have to: what the benches and `fastkv bench` share.

mod flops;
mod measurable;
mod random;
mod shapes;
mod staged;
mod timing;

pub use flops::prefill_flops;
pub use measurable::Measurable;
pub use random::{Normals, random_engine, random_prompts, random_tokens};
pub use shapes::{SHAPES, parameters, shape};
pub use staged::{StageSeconds, Staged};
pub use timing::{TimedPrefill, decode, median, prefill, prefill_by_stage};

#[cfg(feature = "cuda")]
pub use measurable::Blocks;
