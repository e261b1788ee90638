//! Instructions of one lane alone: arithmetic, moves, predicates.

use super::{Cluster, Warp, lanes};
use crate::{
    alu,
    isa::{Approximation, Carry, Guard, Op, Operand, Space, Special},
    number::{Lanes, Scalar, flush},
};

use super::memory::{LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WINDOW};

impl Warp {
    pub(super) fn set(&mut self, d: u32, values: &Lanes, active: u32) {
        let register = &mut self.registers[d as usize];
        if active == u32::MAX {
            *register = *values;
        } else {
            for lane in lanes(active) {
                register[lane] = values[lane];
            }
        }
    }

    pub(super) fn set_predicate(&mut self, d: u32, bits: u32, active: u32) {
        let predicate = &mut self.predicates[d as usize];
        *predicate = *predicate & !active | bits & active;
    }

    pub(super) fn guard(&self, guard: Guard) -> u32 {
        let bits = self.predicates[guard.register as usize];
        if guard.negated { !bits } else { bits }
    }
}

impl Cluster<'_> {
    /// An operand in all lanes.
    pub(super) fn value(&self, w: usize, operand: Operand) -> Lanes {
        match operand {
            Operand::Register(number) => self.warps[w].registers[number as usize],
            Operand::Immediate(value) => [value; 32],
            Operand::Special(special) => self.special(w, special),
        }
    }

    fn special(&self, w: usize, special: Special) -> Lanes {
        let run = self.run;
        let cta = self.cta(w);
        let thread = |lane: usize| self.thread(w, lane);
        let [x, y, _] = run.block;
        let uniform = |value: u32| [u64::from(value); 32];
        let each = |f: &dyn Fn(usize) -> u32| std::array::from_fn(|lane| u64::from(f(lane)));
        match special {
            Special::Tid(0) => each(&|lane| thread(lane) % x),
            Special::Tid(1) => each(&|lane| thread(lane) / x % y),
            Special::Tid(_) => each(&|lane| thread(lane) / x / y),
            Special::Ntid(axis) => uniform(run.block[axis as usize]),
            Special::Ctaid(axis) => uniform(cta.id[axis as usize]),
            Special::Nctaid(axis) => uniform(run.grid[axis as usize]),
            Special::Clusterid(axis) => uniform(cta.id[axis as usize] / run.cluster[axis as usize]),
            Special::Nclusterid(axis) => uniform(run.grid[axis as usize] / run.cluster[axis as usize]),
            Special::ClusterCtaid(axis) => uniform(cta.id[axis as usize] % run.cluster[axis as usize]),
            Special::ClusterNctaid(axis) => uniform(run.cluster[axis as usize]),
            Special::ClusterCtarank => uniform(self.warps[w].cta as u32),
            Special::ClusterNctarank => uniform(self.ctas.len() as u32),
            Special::ExplicitCluster => uniform(run.explicit_cluster.into()),
            Special::Laneid => each(&|lane| lane as u32),
            Special::Warpid => uniform(self.warps[w].place),
            Special::Nwarpid => uniform(cta.warps.len() as u32),
            Special::LanemaskEq => each(&|lane| 1 << lane),
            Special::LanemaskLt => each(&|lane| (1 << lane) - 1),
            Special::LanemaskLe => each(&|lane| u32::MAX >> (31 - lane)),
            Special::LanemaskGt => each(&|lane| !(u32::MAX >> (31 - lane))),
            Special::LanemaskGe => each(&|lane| u32::MAX << lane),
            Special::Clock => [self.steps; 32],
            Special::Smid => uniform(cta.number % 132),
            Special::DynamicSharedBase => uniform(run.dynamic_base()),
            Special::DynamicSharedBytes => uniform(run.dynamic_shared),
            Special::TotalSharedBytes => uniform(run.shared_bytes()),
        }
    }

    pub(super) fn scalar_op(&mut self, w: usize, active: u32, op: &Op) {
        let value = |operand: &Operand| self.value(w, *operand);
        match op {
            Op::Unary { apply, d, a } => {
                let result = apply(&value(a));
                self.warps[w].set(*d, &result, active);
            }
            Op::Binary { apply, d, a, b } => {
                let result = apply(&value(a), &value(b));
                self.warps[w].set(*d, &result, active);
            }
            Op::Ternary { apply, d, a, b, c } => {
                let result = apply(&value(a), &value(b), &value(c));
                self.warps[w].set(*d, &result, active);
            }
            Op::Convert { conversion, d, a, b } => {
                let a = value(a);
                let result = match b {
                    Some(b) => {
                        let b = value(b);
                        std::array::from_fn(|lane| conversion.pack(a[lane], b[lane]))
                    }
                    None => a.map(|bits| conversion.apply(bits)),
                };
                self.warps[w].set(*d, &result, active);
            }
            Op::Lop3 { table, d, a, b, c } => {
                let result = alu::lop3(&value(a), &value(b), &value(c), *table);
                self.warps[w].set(*d, &result, active);
            }
            Op::Insert { bits, d, a, b, position, length } => {
                let (a, b, position, length) = (value(a), value(b), value(position), value(length));
                let mask = if *bits == 64 { u64::MAX } else { 0xffff_ffff };
                let result = std::array::from_fn(|lane| {
                    alu::insert(a[lane] & mask, b[lane] & mask, position[lane], length[lane], *bits)
                });
                self.warps[w].set(*d, &result, active);
            }
            Op::Approximate { function, flush, d, a } => {
                let jitter = self.run.jitter;
                let result = value(a).map(|bits| approximate(*function, *flush, bits as u32, jitter));
                self.warps[w].set(*d, &result, active);
            }
            Op::Divide { flush: ftz, d, a, b } => {
                let (a, b) = (value(a), value(b));
                let jitter = self.run.jitter;
                let result = std::array::from_fn(|lane| {
                    let [mut a, mut b] = [a[lane], b[lane]].map(|bits| f32::from_bits(bits as u32));
                    if *ftz {
                        (a, b) = (flush(a), flush(b));
                    }
                    finish(a / b, *ftz, a.to_bits() ^ b.to_bits().rotate_left(16), jitter)
                });
                self.warps[w].set(*d, &result, active);
            }
            Op::Carry { carry, d, a, b } => {
                let (a, b) = (value(a), value(b));
                self.add_with_carry(w, active, *carry, *d, &a, &b);
            }
            Op::MultiplyCarry { carry, high, d, a, b, c } => {
                let (a, b, c) = (value(a), value(b), value(c));
                let mask = if carry.bits == 64 { u64::MAX } else { 0xffff_ffff };
                let product = std::array::from_fn(|lane| {
                    let product = u128::from(a[lane] & mask) * u128::from(b[lane] & mask);
                    (if *high { product >> carry.bits } else { product }) as u64 & mask
                });
                self.add_with_carry(w, active, *carry, *d, &product, &c);
            }
            Op::Pack { d, parts, bits } => {
                let mut result = [0; 32];
                let mask = (1_u64 << bits) - 1;
                for (at, part) in parts.iter().enumerate() {
                    let part = value(part);
                    for lane in 0..32 {
                        result[lane] |= (part[lane] & mask) << (at as u32 * bits);
                    }
                }
                self.warps[w].set(*d, &result, active);
            }
            Op::Unpack { parts, a, bits } => {
                let a = value(a);
                let mask = (1_u64 << bits) - 1;
                for (at, part) in parts.iter().enumerate() {
                    if let Some(d) = part {
                        self.warps[w].set(*d, &a.map(|a| a >> (at as u32 * bits) & mask), active);
                    }
                }
            }
            Op::Compare { apply, p, q, a, b, with } => {
                let bits = apply(&value(a), &value(b));
                let warp = &mut self.warps[w];
                let (yes, no) = match with {
                    None => (bits, !bits),
                    Some((logic, guard)) => {
                        let other = warp.guard(*guard);
                        (logic.apply(bits, other), logic.apply(!bits, other))
                    }
                };
                for (target, bits) in [(p, yes), (q, no)] {
                    if let Some(target) = target {
                        warp.set_predicate(*target, bits, active);
                    }
                }
            }
            Op::Set { apply, yes, d, a, b } => {
                let bits = apply(&value(a), &value(b));
                let result = std::array::from_fn(|lane| if bits >> lane & 1 == 1 { *yes } else { 0 });
                self.warps[w].set(*d, &result, active);
            }
            Op::Select { d, a, b, p, mask } => {
                let (a, b) = (value(a), value(b));
                let warp = &mut self.warps[w];
                let bits = warp.guard(*p);
                let pick = |lane| (if bits >> lane & 1 == 1 { a[lane] } else { b[lane] }) & mask;
                warp.set(*d, &std::array::from_fn(pick), active);
            }
            Op::PredicateLogic { logic, d, a, b } => {
                let warp = &mut self.warps[w];
                let bits = logic.apply(warp.guard(*a), warp.guard(*b));
                warp.set_predicate(*d, bits, active);
            }
            Op::PredicateMove { d, a } => {
                let warp = &mut self.warps[w];
                let bits = warp.guard(*a);
                warp.set_predicate(*d, bits, active);
            }
            Op::PredicateSet { d, a } => {
                let bits = value(a).into_iter().rev().fold(0, |bits, a| bits << 1 | a as u32 & 1);
                self.warps[w].set_predicate(*d, bits, active);
            }
            Op::ConvertAddress { space, to_space, d, a } => {
                let window = window(*space);
                let a = value(a);
                let result =
                    a.map(|a| if *to_space { a.wrapping_sub(window) } else { a.wrapping_add(window) });
                self.warps[w].set(*d, &result, active);
            }
            Op::IsSpace { space, p, a } => {
                let window_of = |address: u64| address & !(WINDOW - 1);
                let bits = value(a).map(|a| match space {
                    Space::Global => ![SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW].contains(&window_of(a)),
                    Space::Shared => {
                        window_of(a) == SHARED_WINDOW && self.rank(w, a) == Some(self.warps[w].cta)
                    }
                    Space::Cluster => window_of(a) == SHARED_WINDOW && self.rank(w, a).is_some(),
                    space => window_of(a) == window(*space),
                });
                let bits = (0..32).fold(0, |all, lane| all | u32::from(bits[lane]) << lane);
                self.warps[w].set_predicate(*p, bits, active);
            }
            Op::ActiveMask { d } => {
                self.warps[w].set(*d, &[u64::from(active); 32], active);
            }
            other => unreachable!("{other:?} is not an instruction of one lane"),
        }
    }

    fn add_with_carry(&mut self, w: usize, active: u32, carry: Carry, d: u32, a: &Lanes, b: &Lanes) {
        let warp = &mut self.warps[w];
        let mask = if carry.bits == 64 { u64::MAX } else { 0xffff_ffff };
        let mut result = [0; 32];
        let mut flags = 0;
        for lane in 0..32 {
            let carried = u128::from(carry.reads && warp.carry >> lane & 1 == 1);
            let (a, b) = (u128::from(a[lane] & mask), u128::from(b[lane] & mask));
            let sum = if carry.subtract { a.wrapping_sub(b).wrapping_sub(carried) } else { a + b + carried };
            result[lane] = sum as u64 & mask;
            flags |= u32::from(sum >> carry.bits & 1 == 1) << lane;
        }
        if carry.writes {
            warp.carry = warp.carry & !active | flags & active;
        }
        warp.set(d, &result, active);
    }
}

fn window(space: Space) -> u64 {
    match space {
        Space::Shared | Space::Cluster => SHARED_WINDOW,
        Space::Local => LOCAL_WINDOW,
        Space::Param => PARAM_WINDOW,
        Space::Generic | Space::Global | Space::Const => 0,
    }
}

/// A function that a GPU only approximates: the exact result rounded, and off by up to two units in
/// the last place where jitter is on, always the same for the same argument.
fn approximate(function: Approximation, ftz: bool, bits: u32, jitter: Option<u64>) -> u64 {
    let a = f32::from_bits(bits);
    let a = f64::from(if ftz { flush(a) } else { a });
    let result = match function {
        Approximation::Ex2 => a.exp2(),
        Approximation::Lg2 => a.log2(),
        Approximation::Reciprocal => 1.0 / a,
        Approximation::ReciprocalRoot => 1.0 / a.sqrt(),
        Approximation::Root => a.sqrt(),
        Approximation::Sin => a.sin(),
        Approximation::Cos => a.cos(),
        Approximation::Tanh => a.tanh(),
    };
    finish(result as f32, ftz, bits, jitter)
}

fn finish(result: f32, ftz: bool, seed: u32, jitter: Option<u64>) -> u64 {
    let result = if ftz { flush(result) } else { result };
    let exact = result == 0.0 || !result.is_normal();
    let Some(jitter) = jitter.filter(|_| !exact) else {
        return result.put();
    };
    let mixed = (u64::from(seed) ^ jitter).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let steps = (mixed >> 32) % 5;
    let moved = f32::from_bits(result.to_bits().wrapping_add(steps as u32).wrapping_sub(2));
    if moved.is_normal() { moved.put() } else { result.put() }
}
