//! `src/abi.rs` is what bindgen makes of `kernels/abi.h`. With `FASTKV_UPDATE=1` it becomes so.

use std::{env, fs};

#[test]
fn committed_bindings_are_current() {
    let generated = include_str!(concat!(env!("OUT_DIR"), "/abi.rs"));
    let committed = concat!(env!("CARGO_MANIFEST_DIR"), "/src/abi.rs");
    if env::var_os("FASTKV_UPDATE").is_some_and(|value| value == "1") {
        fs::write(committed, generated).unwrap();
    }
    let committed = fs::read_to_string(committed).unwrap();
    for (number, (is, should_be)) in committed.lines().zip(generated.lines()).enumerate() {
        assert_eq!(is, should_be, "src/abi.rs, line {}; {HOW}", number + 1);
    }
    assert_eq!(committed.len(), generated.len(), "src/abi.rs ends elsewhere than kernels/abi.h; {HOW}");
}

const HOW: &str = "run `FASTKV_UPDATE=1 cargo test --features bindgen --test bindings`";
