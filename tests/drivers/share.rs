//! Numbers of keys that heads share.

use crate::support::recorder::Recorder;
use fastkv::{
    abi::ShareKeysParams,
    kernels::{
        Error, Kernel,
        share::{ShareKeys, share_keys},
    },
};

fn share() -> ShareKeys {
    ShareKeys {
        best: 1 << 40,
        count: 800,
        heads: 8,
        keys: 1000,
        mean: 100,
        assured: 0,
        floor: 0.255,
        tail: 8,
        slack: 5,
        counts: 2 << 40,
        starts: 3 << 40,
    }
}

#[test]
fn one_warp_gets_the_shares() {
    let recorder = Recorder::default();
    // SAFETY: the recorder touches no memory, here and below.
    unsafe { share_keys(&recorder, &share()) }.unwrap();
    let launches = recorder.launches();
    let [launch] = &launches[..] else { panic!("{launches:?}") };
    assert_eq!((launch.kernel, launch.grid, launch.block), (Kernel::ShareKeys, [1, 1, 1], [32, 1, 1]));
    let params: ShareKeysParams = bytemuck::pod_read_unaligned(&launch.params);
    assert_eq!((params.share, params.every, params.assured), (0.745, 25, 0));
    assert_eq!((params.count, params.heads, params.keys, params.tail, params.slack), (800, 8, 1000, 8, 5));
}

#[test]
fn what_is_assured_is_no_part_of_the_shares() {
    let recorder = Recorder::default();
    let params = |assured| {
        // SAFETY: as above.
        unsafe { share_keys(&recorder, &ShareKeys { assured, ..share() }) }.unwrap();
        let params: ShareKeysParams = bytemuck::pod_read_unaligned(&recorder.last().params);
        (params.assured, params.every)
    };
    assert_eq!(params(40), (40, 15), "60 · 0.255");
    assert_eq!(params(u32::MAX), (1000, 0), "no more than a head has");
}

#[test]
fn no_heads_launch_nothing() {
    let recorder = Recorder::default();
    // SAFETY: as above.
    unsafe { share_keys(&recorder, &ShareKeys { heads: 0, count: 0, ..share() }) }.unwrap();
    assert!(recorder.launches().is_empty());
}

#[test]
fn what_there_can_be_at_most() {
    // 800 picks of one head: 800 · 0.745 + 25 = 621.
    assert_eq!(share().most_of_head(), 621 + 8);
    assert_eq!(ShareKeys { keys: 300, ..share() }.most_of_head(), 248 + 8, "300 picks at most: 248.5");
    assert_eq!(ShareKeys { keys: 20, ..share() }.most_of_head(), 20 + 8);
    // 40 + 760 · 0.745 + 15 = 621.2.
    assert_eq!(ShareKeys { assured: 40, ..share() }.most_of_head(), 621 + 8);
    assert_eq!(ShareKeys { assured: 2000, ..share() }.most_of_head(), 800 + 8);
    assert_eq!(share().most_rows(), 8 * (100 + 8 + 5) + 4);
    assert_eq!(ShareKeys { keys: 20, ..share() }.most_rows(), 8 * (20 + 8 + 5));
    let huge = u32::MAX;
    let most = ShareKeys { heads: huge, keys: huge, mean: huge, tail: huge, slack: huge, ..share() };
    assert_eq!(most.most_rows(), u64::MAX, "no overflow");
}

#[test]
fn refuses() {
    let recorder = Recorder::default();
    let refused = |work: ShareKeys, message: &str| {
        // SAFETY: as above.
        let result: Result<(), Error> = unsafe { share_keys(&recorder, &work) };
        assert_eq!(result.expect_err(message).to_string(), message);
        assert!(recorder.launches().is_empty(), "{message}");
    };
    refused(ShareKeys { floor: 1.5, ..share() }, "floor is 1.5; it must be from 0 to 1");
    refused(ShareKeys { floor: f64::NAN, ..share() }, "floor is NaN; it must be from 0 to 1");
    refused(
        ShareKeys { count: 801, ..share() },
        "count is 801; it must be at most 800: heads * mean, and the keys",
    );
    refused(
        ShareKeys { keys: 1 << 28, ..share() },
        "heads * keys is 2147483648; it must be at most 2147483647",
    );
    refused(
        ShareKeys { tail: i32::MAX as u32, ..share() },
        "tail is 2147483647; it must be at most 2147482647 behind 1000 keys",
    );
    refused(ShareKeys { slack: 1 << 31, ..share() }, "slack is 2147483648; it must be at most 2147483647");
    refused(ShareKeys { best: 0, ..share() }, "best is 0x0; it must be a device address, a multiple of 4");
    refused(
        ShareKeys { starts: 4 + (3 << 40), ..share() },
        "starts is 0x30000000004; it must be a device address, a multiple of 8",
    );
    refused(
        ShareKeys { counts: 1 << 40, ..share() },
        "counts is 0x10000000000..0x10000000020; it must be apart from best, 0x10000000000..0x10000000c80",
    );
}
