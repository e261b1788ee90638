//! Allocations as large as those of a GPU, of which a program touches little.

use ptx_emulator::{Device, Error, Hazard, Launch};

const BYTES: usize = 12 << 30;

/// Runs so many threads with an allocation of so many bytes, whose first word is 7; `%at` is its address, `%far` that of its
/// last word.
fn run(threads: u32, body: &str) -> Result<(Device, u64), Error> {
    let mut device = Device::new();
    device.load(&format!(
        ".version 9.0\n.target sm_80\n.address_size 64\n\
         .visible .entry k(.param .u64 given) {{\n\
         .reg .b32 %r<4>; .reg .b64 %at, %far;\n\
         ld.param.u64 %at, [given]; add.u64 %far, %at, {}; mov.u32 %r1, %tid.x;\n\
         {body}\nret;\n}}",
        BYTES - 4
    ))?;
    let [before, at, behind] = [0; 3].map(|_| device.alloc(BYTES));
    assert!(before + BYTES as u64 <= at && at + BYTES as u64 <= behind);
    device.write(at, &7_u32.to_le_bytes())?;
    let (grid, block, params) = ([1; 3], [threads, 1, 1], &at.to_le_bytes());
    device.launch(&Launch { kernel: "k", grid, cluster: [1; 3], block, shared_bytes: 0, params })?;
    Ok((device, at))
}

#[track_caller]
fn fault(threads: u32, body: &str, hazard: Hazard) {
    match run(threads, body) {
        Err(Error::Fault(fault)) => assert_eq!(fault.hazard, hazard, "{fault}"),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("a bug was not found"),
    }
}

#[test]
fn words_at_both_ends() {
    let (mut device, at) = run(1, "ld.global.u32 %r0, [%at]; st.global.u32 [%far], %r0;").unwrap();
    let last = at + BYTES as u64 - 4;
    assert_eq!(device.read(last, 4).unwrap(), 7_u32.to_le_bytes());
    assert!(device.read(last - 1, 5).is_err_and(|error| error.to_string().contains("never written")));
    assert!(device.read(at + (8 << 30), 4).is_err_and(|error| error.to_string().contains("never written")));
    assert!(device.read(last, 5).is_err());
    device.free(at).unwrap();
    assert!(device.read(last, 4).is_err());
}

/// Host bytes that begin and end anywhere, across places where the emulator begins a page.
#[test]
fn bytes_across_pages() {
    let mut device = Device::new();
    let at = device.alloc(BYTES);
    let bytes: Vec<u8> = (0..200_003).map(|n| (n % 251) as u8).collect();
    for offset in [0, 1, 65_533, (6 << 30) - 3, BYTES - bytes.len()] {
        let address = at + offset as u64;
        device.write(address, &bytes).unwrap();
        assert_eq!(device.read(address, bytes.len()).unwrap(), bytes, "{offset}");
    }
}

#[test]
fn hazards_far_from_the_beginning() {
    fault(1, "ld.global.u32 %r0, [%far];", Hazard::Uninitialised);
    fault(1, "st.global.u32 [%far+4], %r1;", Hazard::OutOfBounds);
    fault(2, "st.global.u32 [%far], %r1;", Hazard::Race);
}
