//! From an opcode and its operands to an operation. What is not here is not implemented, and an error.

mod barrier;
mod copy;
mod memory;
mod operands;

use self::{
    barrier::{barrier, cluster_barrier, mbarrier},
    copy::{copy_async, store_async},
    memory::{access, atomic},
    operands::Operands,
};
use super::{Argument, Target};
use crate::{
    alu,
    isa::{
        Approximation, Carry, Guard, MatrixType, Op, Operand, Product, Shuffle, Space, Special, Type, Vote,
    },
};

type Result<T> = std::result::Result<T, String>;
type Labels<'a> = dyn Fn(&str) -> Result<u32> + 'a;
type Tables<'a> = dyn Fn(&str) -> Result<Vec<u32>> + 'a;

const UNKNOWN: &str = "this instruction is not implemented";

pub(super) fn decode(
    opcode: &str,
    arguments: &[Argument],
    label: &Labels<'_>,
    table: &Tables<'_>,
) -> Result<Op> {
    let words: Vec<&str> = opcode.split('.').collect();
    let mut operands = Operands { left: arguments };
    let op = operation(&words, &mut operands, label, table)?;
    if operands.is_empty() {
        Ok(op)
    } else {
        Err("there are more operands than this instruction takes".into())
    }
}

fn operation(words: &[&str], o: &mut Operands<'_>, label: &Labels<'_>, table: &Tables<'_>) -> Result<Op> {
    let ty = words.last().and_then(|word| Type::parse(word));
    match words {
        ["bra"] | ["bra", "uni"] => match o.next()? {
            Argument::Label(name) => Ok(Op::Branch { target: label(name)? }),
            _ => Err("a branch goes to a label".into()),
        },
        ["brx", "idx"] | ["brx", "idx", "uni"] => {
            let index = o.value()?;
            match o.next()? {
                Argument::Label(name) => Ok(Op::BranchTable { index, targets: table(name)? }),
                _ => Err("brx goes to a table of labels".into()),
            }
        }
        ["ret" | "exit"] | ["ret", "uni"] => Ok(Op::Exit),
        ["trap" | "brkpt"] => Ok(Op::Trap),
        ["vprintf"] => {
            let [result, format, arguments] = [o.immediate()?, o.immediate()?, o.immediate()?];
            Ok(Op::Print { result, params: [format, arguments] })
        }
        ["__assertfail"] => {
            let params = [o.immediate()?, o.immediate()?, o.immediate()?, o.immediate()?];
            o.immediate()?;
            Ok(Op::AssertFail { params })
        }
        ["nanosleep", "u32"] => o.value().map(|_| Op::Yield),
        ["prefetch" | "prefetchu", ..] => o.address().map(|_| Op::Nothing),
        // What a cache is told shows in time alone, so any number will do.
        ["createpolicy", "fractional", first, rest @ .., "b64"]
            if first.starts_with("L2::") && rest.iter().all(|rest| rest.starts_with("L2::")) =>
        {
            let d = o.register()?;
            if !o.is_empty() {
                o.value()?;
            }
            let apply = alu::one(&["mov", "b64"]).ok_or(UNKNOWN)?;
            Ok(Op::Unary { apply, d, a: Operand::Immediate(0) })
        }
        ["griddepcontrol", "wait" | "launch_dependents"] => Ok(Op::Nothing),
        ["setmaxnreg", action @ ("inc" | "dec"), "sync", "aligned", "u32"] => match o.immediate()? {
            count @ 24..=256 if count % 8 == 0 => {
                Ok(Op::SetRegisters { increases: *action == "inc", count: count as u32 })
            }
            _ => Err("a register count is a multiple of 8 from 24 to 256".into()),
        },
        ["mov", _] => moves(ty.ok_or(UNKNOWN)?, o),
        ["cvta", ..] => address_conversion(words, o),
        ["isspacep", space] => {
            let space = match *space {
                "global" => Space::Global,
                "shared" | "shared::cta" => Space::Shared,
                "shared::cluster" => Space::Cluster,
                "local" => Space::Local,
                "param" => Space::Param,
                _ => return Err(UNKNOWN.into()),
            };
            Ok(Op::IsSpace { space, p: o.predicate()?, a: o.value()? })
        }
        ["cvt", rest @ ..] => {
            let conversion = alu::conversion(rest).ok_or(UNKNOWN)?;
            let d = o.register()?;
            let a = o.value()?;
            let b = if conversion.packs() { Some(o.value()?) } else { None };
            Ok(Op::Convert { conversion, d, a, b })
        }
        ["setp", rest @ ..] => comparison(rest, o),
        ["set", operator, middle @ .., to, from] => {
            let ftz = middle == ["ftz"];
            let from = Type::parse(from).ok_or(UNKNOWN)?;
            let apply = alu::comparison(operator, from, ftz).ok_or(UNKNOWN)?;
            let yes = match (*to, middle) {
                ("u32" | "s32", [] | ["ftz"]) => 0xffff_ffff,
                ("f32", [] | ["ftz"]) => u64::from(1.0_f32.to_bits()),
                _ => return Err(UNKNOWN.into()),
            };
            Ok(Op::Set { apply, yes, d: o.register()?, a: o.value()?, b: o.value()? })
        }
        ["selp", _] => {
            let mask = low_bits(ty.ok_or(UNKNOWN)?);
            Ok(Op::Select { d: o.register()?, a: o.value()?, b: o.value()?, p: o.guard()?, mask })
        }
        ["and" | "or" | "xor", "pred"] => {
            let logic = alu::logic(words[0]).ok_or(UNKNOWN)?;
            Ok(Op::PredicateLogic { logic, d: o.predicate()?, a: o.guard()?, b: o.guard()? })
        }
        ["not", "pred"] => {
            let (d, a) = (o.predicate()?, o.guard()?);
            Ok(Op::PredicateMove { d, a: Guard { negated: !a.negated, ..a } })
        }
        ["lop3", "b32"] => {
            let (d, a, b, c) = (o.register()?, o.value()?, o.value()?, o.value()?);
            Ok(Op::Lop3 { table: o.immediate()? as u8, d, a, b, c })
        }
        ["bfi", "b32" | "b64"] => {
            let bits = if words[1] == "b32" { 32 } else { 64 };
            let (d, a, b) = (o.register()?, o.value()?, o.value()?);
            Ok(Op::Insert { bits, d, a, b, position: o.value()?, length: o.value()? })
        }
        ["add" | "sub" | "addc" | "subc", "cc", _] | ["addc" | "subc", _] => {
            let (d, a, b) = (o.register()?, o.value()?, o.value()?);
            Ok(Op::Carry { carry: carry(words, ty)?, d, a, b })
        }
        ["mad" | "madc", half @ ("lo" | "hi"), "cc", _] | ["madc", half @ ("lo" | "hi"), _] => {
            let (d, a, b, c) = (o.register()?, o.value()?, o.value()?, o.value()?);
            Ok(Op::MultiplyCarry { carry: carry(words, ty)?, high: *half == "hi", d, a, b, c })
        }
        ["ld" | "ldu", rest @ ..] => {
            let access = access(rest)?;
            let d = o.registers()?;
            let address = o.address()?;
            if access.hint {
                o.value()?;
            }
            if d.len() != access.count {
                return Err("the vector of registers has another size than the access".into());
            }
            let (space, ty) = (access.space, access.ty);
            Ok(Op::Load { space, ty, order: access.order, constant: access.constant, d, address })
        }
        ["st", "async", rest @ ..] => store_async(rest, o),
        ["st", rest @ ..] => {
            let access = access(rest)?;
            let address = o.address()?;
            let a = o.values()?;
            if access.hint {
                o.value()?;
            }
            if a.len() != access.count || access.constant {
                return Err("the vector of registers has another size than the access".into());
            }
            Ok(Op::Store { space: access.space, ty: access.ty, order: access.order, address, a })
        }
        ["atom" | "red", rest @ ..] => atomic(words[0] == "atom", rest, o),
        ["fence", "proxy", "async"]
        | ["fence", "proxy", "async", "shared::cta" | "shared::cluster" | "global"] => Ok(Op::ProxyFence),
        ["membar", ..] | ["fence", ..] => {
            let known = matches!(
                &words[1..],
                ["cta" | "gl" | "sys"]
                    | ["sc" | "acq_rel", "cta" | "cluster" | "gpu" | "sys"]
                    | ["mbarrier_init", "release", "cluster"]
            );
            if known { Ok(Op::Fence) } else { Err(UNKNOWN.into()) }
        }
        ["barrier", "cluster", rest @ ..] => cluster_barrier(rest),
        ["mapa", rest @ ..] => {
            let space = cluster_space(rest)?;
            Ok(Op::MapAddress { space, d: o.register()?, a: o.value()?, rank: o.value()? })
        }
        ["getctarank", rest @ ..] => {
            let space = cluster_space(rest)?;
            Ok(Op::AddressRank { space, d: o.register()?, a: o.value()? })
        }
        ["bar" | "barrier", rest @ ..] => barrier(words[0] == "bar", rest, o),
        ["shfl", "sync", mode, "b32"] => {
            let mode = match *mode {
                "up" => Shuffle::Up,
                "down" => Shuffle::Down,
                "bfly" => Shuffle::Butterfly,
                "idx" => Shuffle::Index,
                _ => return Err(UNKNOWN.into()),
            };
            let (d, p) = o.register_and_predicate()?;
            let d = d.ok_or("a destination is a register")?;
            Ok(Op::Shuffle { mode, d, p, a: o.value()?, b: o.value()?, c: o.value()?, mask: o.value()? })
        }
        ["vote", "sync", mode, kind] => {
            let mode = match (*mode, *kind) {
                ("all", "pred") => Vote::All,
                ("any", "pred") => Vote::Any,
                ("uni", "pred") => Vote::Uniform,
                ("ballot", "b32") => Vote::Ballot,
                _ => return Err(UNKNOWN.into()),
            };
            let d = if mode == Vote::Ballot { o.register()? } else { o.predicate()? };
            Ok(Op::Vote { mode, d, a: o.guard()?, mask: o.value()? })
        }
        ["activemask", "b32"] => Ok(Op::ActiveMask { d: o.register()? }),
        ["match", how @ ("any" | "all"), "sync", "b32" | "b64"] => {
            let (d, p) = o.register_and_predicate()?;
            let d = d.ok_or("a destination is a register")?;
            let ty = ty.ok_or(UNKNOWN)?;
            Ok(Op::Match { all: *how == "all", ty, d, p, a: o.value()?, mask: o.value()? })
        }
        ["redux", "sync", name, _] => {
            let combine = alu::reduction(name, ty.ok_or(UNKNOWN)?).ok_or(UNKNOWN)?;
            Ok(Op::Redux { combine, d: o.register()?, a: o.value()?, mask: o.value()? })
        }
        ["elect", "sync"] => match o.register_and_predicate()? {
            (d, Some(p)) => Ok(Op::Elect { d, p, mask: o.value()? }),
            _ => Err("elect writes a register and a predicate".into()),
        },
        ["cp", "async", rest @ ..] => copy_async(rest, o),
        ["ldmatrix", "sync", "aligned", "m8n8", count, rest @ .., "b16"] => {
            let (count, transposed) = matrices(count, rest)?;
            let d = o.registers()?.into_iter().collect::<Option<Vec<_>>>().ok_or("no sinks here")?;
            if d.len() != count as usize {
                return Err("the vector of registers has another size than the access".into());
            }
            Ok(Op::LoadMatrix { count, transposed, d, address: o.address()? })
        }
        ["stmatrix", "sync", "aligned", "m8n8", count, rest @ .., "b16"] => {
            let (count, transposed) = matrices(count, rest)?;
            let address = o.address()?;
            let a = o.values()?;
            if a.len() != count as usize {
                return Err("the vector of registers has another size than the access".into());
            }
            Ok(Op::StoreMatrix { count, transposed, address, a })
        }
        ["movmatrix", "sync", "aligned", "m8n8", "trans", "b16"] => {
            Ok(Op::TransposeMatrix { d: o.register()?, a: o.value()? })
        }
        ["mma", "sync", "aligned", shape, "row", "col", to, a, b, from] => {
            let input = match (*a, *b) {
                ("f16", "f16") => MatrixType::F16,
                ("bf16", "bf16") => MatrixType::BF16,
                _ => return Err(UNKNOWN.into()),
            };
            let half_result = match (*to, *from) {
                ("f32", "f32") => false,
                ("f16", "f16") if input == MatrixType::F16 => true,
                _ => return Err(UNKNOWN.into()),
            };
            let k = match *shape {
                "m16n8k16" => 16,
                "m16n8k8" => 8,
                _ => return Err(UNKNOWN.into()),
            };
            let d = o.registers()?.into_iter().collect::<Option<Vec<_>>>().ok_or("no sinks here")?;
            let (a, b, c) = (o.values()?, o.values()?, o.values()?);
            let results = if half_result { 2 } else { 4 };
            if [d.len(), a.len(), b.len(), c.len()] != [results, k as usize / 4, k as usize / 8, results] {
                return Err("a fragment has another number of registers".into());
            }
            Ok(Op::MultiplyMatrix { input, half_result, k, d, a, b, c })
        }
        ["mbarrier", rest @ ..] => mbarrier(rest, o),
        ["wgmma", "fence", "sync", "aligned"] => Ok(Op::ProductFence),
        ["wgmma", "commit_group", "sync", "aligned"] => Ok(Op::ProductCommit),
        ["wgmma", "wait_group", "sync", "aligned"] => Ok(Op::ProductWait { pending: o.immediate()? as u32 }),
        ["wgmma", "mma_async", "sync", "aligned", shape, d @ ("f32" | "f16"), a, b] => {
            product(shape, *d == "f16", a, b, o)
        }
        _ => arithmetic(words, o),
    }
}

fn moves(ty: Type, o: &mut Operands<'_>) -> Result<Op> {
    if ty == Type::Pred {
        let d = o.predicate()?;
        return match o.next()? {
            Argument::Predicate(a) => Ok(Op::PredicateMove { d, a: *a }),
            Argument::Value(Operand::Immediate(value)) => {
                Ok(Op::PredicateSet { d, a: Operand::Immediate(*value) })
            }
            Argument::Value(special @ Operand::Special(Special::ExplicitCluster)) => {
                Ok(Op::PredicateSet { d, a: *special })
            }
            _ => Err("a predicate takes a predicate".into()),
        };
    }
    let bits = ty.bytes() * 8;
    if let Some(Argument::Vector(_)) = o.left.first() {
        let parts = o.registers()?;
        let bits = bits / parts.len() as u32;
        return Ok(Op::Unpack { parts, a: o.value()?, bits });
    }
    let d = o.register()?;
    if let Some(Argument::Vector(_)) = o.left.first() {
        let parts = o.values()?;
        let bits = bits / parts.len() as u32;
        return Ok(Op::Pack { d, parts, bits });
    }
    let apply = alu::one(&["mov", ["b8", "b16", "b32", "b64"][ty.bytes().trailing_zeros() as usize]]);
    Ok(Op::Unary { apply: apply.ok_or(UNKNOWN)?, d, a: o.value()? })
}

/// Generic addresses of global memory are those of global space; the other spaces lie in windows.
fn address_conversion(words: &[&str], o: &mut Operands<'_>) -> Result<Op> {
    let (to_space, space) = match &words[1..] {
        ["to", space, "u64"] => (true, *space),
        [space, "u64"] => (false, *space),
        _ => return Err(UNKNOWN.into()),
    };
    let space = match space {
        "global" => Space::Global,
        "const" => Space::Const,
        "shared" | "shared::cta" => Space::Shared,
        "shared::cluster" => Space::Cluster,
        "local" => Space::Local,
        "param" => Space::Param,
        _ => return Err(UNKNOWN.into()),
    };
    Ok(Op::ConvertAddress { space, to_space, d: o.register()?, a: o.value()? })
}

fn comparison(words: &[&str], o: &mut Operands<'_>) -> Result<Op> {
    let [operator, middle @ .., ty] = words else { return Err(UNKNOWN.into()) };
    let ty = Type::parse(ty).ok_or(UNKNOWN)?;
    let ftz = middle.contains(&"ftz");
    let logic: Vec<&&str> = middle.iter().filter(|word| **word != "ftz").collect();
    let apply = alu::comparison(operator, ty, ftz).ok_or(UNKNOWN)?;
    let (p, q) = match o.next()? {
        Argument::Predicate(Guard { register, negated: false }) => (Some(*register), None),
        Argument::Pair(p, q) => {
            let predicate = |target: &Option<Target>| match target {
                None => Ok(None),
                Some(Target::Predicate(number)) => Ok(Some(*number)),
                Some(Target::Register(_)) => Err("a comparison writes predicates".to_string()),
            };
            (predicate(p)?, predicate(q)?)
        }
        _ => return Err("a comparison writes a predicate".into()),
    };
    let (a, b) = (o.value()?, o.value()?);
    let with = match logic.as_slice() {
        [] => None,
        [word] => Some((alu::logic(word).ok_or(UNKNOWN)?, o.guard()?)),
        _ => return Err(UNKNOWN.into()),
    };
    Ok(Op::Compare { apply, p, q, a, b, with })
}

fn carry(words: &[&str], ty: Option<Type>) -> Result<Carry> {
    let ty =
        ty.filter(|ty| matches!(ty, Type::U32 | Type::S32 | Type::B32 | Type::U64 | Type::S64 | Type::B64));
    Ok(Carry {
        subtract: words[0].starts_with("sub"),
        reads: words[0].ends_with('c'),
        writes: words.contains(&"cc"),
        bits: ty.ok_or(UNKNOWN)?.bytes() * 8,
    })
}

/// The space of `mapa` and `getctarank`.
fn cluster_space(words: &[&str]) -> Result<Space> {
    match words {
        ["u32" | "u64"] => Ok(Space::Generic),
        ["shared::cluster", "u32" | "u64"] => Ok(Space::Cluster),
        _ => Err(UNKNOWN.into()),
    }
}

fn matrices(count: &str, rest: &[&str]) -> Result<(u32, bool)> {
    let count = match count {
        "x1" => 1,
        "x2" => 2,
        "x4" => 4,
        _ => return Err(UNKNOWN.into()),
    };
    match rest {
        ["shared" | "shared::cta"] => Ok((count, false)),
        ["trans", "shared" | "shared::cta"] => Ok((count, true)),
        _ => Err(UNKNOWN.into()),
    }
}

fn product(shape: &str, half_result: bool, a: &str, b: &str, o: &mut Operands<'_>) -> Result<Op> {
    let input = match (a, b) {
        ("f16", "f16") => MatrixType::F16,
        ("bf16", "bf16") if !half_result => MatrixType::BF16,
        _ => return Err(UNKNOWN.into()),
    };
    let n = shape
        .strip_prefix("m64n")
        .and_then(|rest| rest.strip_suffix("k16"))
        .and_then(|n| n.parse::<u32>().ok());
    let n = n.filter(|n| n.is_multiple_of(8) && (8..=256).contains(n)).ok_or(UNKNOWN)?;
    let d = o.registers()?.into_iter().collect::<Option<Vec<_>>>().ok_or("no sinks here")?;
    let a = o.values()?;
    if d.len() != n as usize / if half_result { 4 } else { 2 } || !matches!(a.len(), 1 | 4) {
        return Err("a fragment has another number of registers".into());
    }
    let b = o.value()?;
    let (accumulate, accumulate_if) = match o.next()? {
        Argument::Predicate(guard) => (false, Some(*guard)),
        Argument::Value(Operand::Immediate(value)) => (*value != 0, None),
        _ => return Err("scale-d is a predicate or a number".into()),
    };
    let mut negate = false;
    for _ in 0..2 {
        negate ^= match o.immediate()? as i64 {
            1 => false,
            -1 => true,
            _ => return Err("a scale is 1 or -1".into()),
        };
    }
    let transpose_a = a.len() == 1 && o.immediate()? == 1;
    let transpose_b = o.immediate()? == 1;
    Ok(Op::Product(Product {
        n,
        input,
        half_result,
        d,
        a,
        b,
        accumulate,
        accumulate_if,
        negate,
        transpose_a,
        transpose_b,
    }))
}

/// What has values in and a value out.
fn arithmetic(words: &[&str], o: &mut Operands<'_>) -> Result<Op> {
    let [name, middle @ .., last] = words else { return Err(UNKNOWN.into()) };
    let ftz = middle.contains(&"ftz");
    let approximate = middle.first() == Some(&"approx")
        && *last == "f32"
        && (middle.len() == 1 || ftz && middle.len() == 2);
    let function = match *name {
        "ex2" => Some(Approximation::Ex2),
        "lg2" => Some(Approximation::Lg2),
        "rcp" => Some(Approximation::Reciprocal),
        "rsqrt" => Some(Approximation::ReciprocalRoot),
        "sqrt" => Some(Approximation::Root),
        "sin" => Some(Approximation::Sin),
        "cos" => Some(Approximation::Cos),
        "tanh" => Some(Approximation::Tanh),
        _ => None,
    };
    if let (Some(function), true) = (function, approximate) {
        return Ok(Op::Approximate { function, flush: ftz, d: o.register()?, a: o.value()? });
    }
    if *name == "div" && *last == "f32" && matches!(middle, ["approx" | "full"] | ["approx" | "full", "ftz"])
    {
        return Ok(Op::Divide { flush: ftz, d: o.register()?, a: o.value()?, b: o.value()? });
    }
    if let Some(apply) = alu::one(words) {
        return Ok(Op::Unary { apply, d: o.register()?, a: o.value()? });
    }
    if let Some(apply) = alu::two(words) {
        return Ok(Op::Binary { apply, d: o.register()?, a: o.value()?, b: o.value()? });
    }
    if let Some(apply) = alu::three(words) {
        return Ok(Op::Ternary { apply, d: o.register()?, a: o.value()?, b: o.value()?, c: o.value()? });
    }
    Err(UNKNOWN.into())
}

fn low_bits(ty: Type) -> u64 {
    match ty.bytes() {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}
