//! Ctrl-C: the first one asks the work to stop, the second one ends the program.

use fastkv::engine::Cancel;

use crate::exit::INTERRUPTED;

/// A token that the first Ctrl-C cancels.
pub(crate) fn on_ctrl_c() -> Cancel {
    let cancel = Cancel::default();
    let asked = cancel.clone();
    let handler = move || {
        if asked.is_cancelled() {
            std::process::exit(INTERRUPTED.into());
        }
        asked.cancel();
        eprintln!("\nfastkv: stopping; once more ends at once");
    };
    if let Err(error) = ctrlc::set_handler(handler) {
        eprintln!("fastkv: Ctrl-C will end the program at once: {error}");
    }
    cancel
}
