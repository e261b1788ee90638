//! The drivers without a GPU: what they launch, and what they refuse. A file for each kernel family.

#[path = "../support/mod.rs"]
mod support;

mod attention;
mod columns;
mod decode;
mod gather;
mod llama;
mod scores;
mod select;
mod share;
mod sums;
mod workspace;

use fastkv::kernels::{Kernel, images};

/// Every kernel that a driver can name is in an image, on every architecture.
#[test]
#[cfg_attr(not(fastkv_kernels), ignore = "built without nvcc")]
fn images_hold_every_kernel() {
    assert!(images::built() && images::nvcc_version().is_some());
    for (number, kernel) in Kernel::ALL.iter().enumerate() {
        assert_eq!(*kernel as usize, number);
        let image = images::images().iter().find(|image| image.name == kernel.image()).expect("an image");
        assert!(!image.archs.is_empty());
        for arch in image.archs {
            let ptx = images::ptx(image.name, arch).expect("PTX, which FASTKV_PTX=1 compiles");
            assert!(ptx.contains(&format!(".entry {}(", kernel.entry())), "{}", kernel.entry());
            assert!(ptx.contains(&format!(".target {arch}\n")), "{}: {arch}", image.name);
        }
        // A fatbin begins with this word.
        assert_eq!(image.fatbin[..4], 0xBA55_ED50_u32.to_le_bytes());
        assert!((image.fatbin.as_ptr() as usize).is_multiple_of(16));
    }
}
