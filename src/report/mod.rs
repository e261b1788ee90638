//! Results for people: pictures of what a policy kept.

mod markup;
mod picture;

pub use picture::{KeptPicture, describe};
