//! Results for people: pictures of what a policy kept, and a page of all that was measured.

mod accuracy;
mod chart;
mod kept;
mod markup;
mod page;
mod picture;
mod results;
mod scale;
mod section;
mod speed;

pub use chart::Picture;
pub use page::Report;
pub use picture::{KeptPicture, describe};
pub use results::{Bench, BenchSettings, Measured, ReportError, Skipped};
