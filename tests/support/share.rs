//! How many keys heads get that share a number of them: the formula in integers and f64, and runs on a device.

use fastkv::kernels::{
    Device,
    share::{ShareKeys, share_keys},
};

use super::{Check, all, memory::Memory, random::Random};

pub(crate) fn checks<D: Device>() -> Vec<Check<D>> {
    vec![Check::portable("share_keys", |device, seed| all(cases(seed), |case| check(device, case)))]
}

#[derive(Clone, Debug)]
struct Case {
    /// How many of the best keys belong to each head.
    picks: Vec<usize>,
    keys: usize,
    mean: usize,
    /// Picks that a head keeps beside its share.
    assured: usize,
    floor: f64,
    tail: usize,
    slack: usize,
}

fn cases(seed: u64) -> Vec<Case> {
    let case = |picks: &[usize], keys, mean, floor| Case {
        picks: picks.to_vec(),
        keys,
        mean,
        assured: 0,
        floor,
        tail: 8,
        slack: 0,
    };
    let mut cases = vec![
        case(&[0], 0, 0, 0.2),
        case(&[0], 5, 0, 0.2),
        case(&[5], 5, 100, 0.5),
        // Halves go to the even number: 2.5 and 3.5.
        case(&[5, 7, 0, 0], 20, 3, 0.5),
        case(&[12, 0, 0], 20, 4, 0.0),
        case(&[0, 0, 12], 20, 4, 1.0),
        // More than it has.
        case(&[10, 10, 0], 10, 9, 0.9),
        // Of 3, 2 and 1 picks 2 stay as they are: 2 + 0.5 + int(0.5), 2 + 0 and 1 + 0; all of them, and more.
        Case { assured: 2, ..case(&[3, 2, 1], 20, 3, 0.5) },
        Case { assured: 20, ..case(&[20, 20, 0], 20, 20, 0.9) },
        Case { assured: 1 << 30, ..case(&[5, 4], 20, 1 << 30, 0.9) },
        Case { tail: 0, slack: 1 << 30, ..case(&[3; 40], 1 << 20, 3, 0.3) },
    ];
    let mut random = Random(seed);
    for _ in 0..12 {
        let heads = random.of(&[1, 2, 8, 31, 32, 33, 64, 70]);
        let keys = 1 + random.below(300);
        let mean = random.below(200);
        // All that there are, or any split of them.
        let mut left = (mean * heads).min(keys * heads);
        let picks = (0..heads).map(|head| {
            let least = left.saturating_sub(keys * (heads - 1 - head));
            let picks = (least + random.below(keys)).min(left).min(keys);
            left -= picks;
            picks
        });
        let picks = picks.collect();
        let floor = random.of(&[0.0, 0.1, 0.2, 0.3, 0.5, 1.0 / 3.0, 0.7, 0.9, 1.0]);
        let assured = random.of(&[0, 0, 1, 7, 50, 400]);
        cases.push(Case {
            picks,
            keys,
            mean,
            assured,
            floor,
            tail: random.below(70),
            slack: random.below(5),
        });
    }
    cases
}

fn check<D: Device>(device: &D, case: &Case) -> Result<(), String> {
    let Case { picks, keys, mean, assured, floor, tail, slack } = case;
    let (heads, keys) = (picks.len(), *keys);
    let mut memory = Memory::new(device);
    let mut random = Random(7);
    // Which keys of a head are its best does not matter.
    let of_head = |(head, picks): (usize, &usize)| {
        let first = random.below(keys - picks + 1);
        (first..first + picks).map(move |key| (head * keys + key) as i32)
    };
    let best: Vec<i32> = picks.iter().enumerate().flat_map(of_head).collect();
    let (counts, starts) = (memory.untouched(4 * (heads + 1)), memory.untouched(8 * (heads + 1)));
    let work = ShareKeys {
        best: memory.put(bytemuck::cast_slice(&best)),
        count: best.len() as u32,
        heads: heads as u32,
        keys: keys as u32,
        mean: *mean as u32,
        assured: *assured as u32,
        floor: *floor,
        tail: *tail as u32,
        slack: *slack as u32,
        counts,
        starts,
    };
    // SAFETY: blocks of `memory` of the sizes stated.
    unsafe { share_keys(device, &work) }.map_err(|error| error.to_string())?;
    let every = (mean.saturating_sub(*assured) as f64 * floor).floor();
    let count = |picks: &usize| {
        let sure = (*picks).min(*assured);
        let shared = ((picks - sure) as f64 * (1.0 - floor) + every).round_ties_even() as usize;
        (sure + shared).min(keys) + tail
    };
    let expected: Vec<usize> = picks.iter().map(count).collect();
    let start = |head: usize| expected[..head].iter().map(|count| (count + slack) as i64).sum::<i64>();
    let mut bytes: Vec<u8> = Vec::new();
    expected.iter().for_each(|count| bytes.extend((*count as i32).to_ne_bytes()));
    bytes.extend([super::memory::UNTOUCHED; 4]);
    memory.expect("counts", counts, &bytes)?;
    bytes = (0..heads).flat_map(|head| start(head).to_ne_bytes()).collect();
    bytes.extend([super::memory::UNTOUCHED; 8]);
    memory.expect("starts", starts, &bytes)?;
    let rows: u64 = expected.iter().map(|count| (count + slack) as u64).sum();
    if rows > work.most_rows() {
        return Err(format!("{rows} rows, where {} were the most", work.most_rows()));
    }
    match expected.iter().find(|count| **count as u64 > work.most_of_head()) {
        Some(count) => Err(format!("{count} keys of a head, where {} were the most", work.most_of_head())),
        None => Ok(()),
    }
}
