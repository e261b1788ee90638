//! Reads what cuobjdump prints: resources and machine code of every kernel in a fatbin.

use std::{collections::BTreeMap, path::Path, process::Command};

/// A kernel as one architecture runs it.
#[derive(Clone, Debug)]
pub(crate) struct Compiled {
    /// `sm_90`
    pub(crate) arch: String,
    pub(crate) entry: String,
    pub(crate) registers: u32,
    /// Bytes of the stack and of local memory of a thread: spills, and arrays that are indexed at run time.
    pub(crate) local_bytes: u32,
    /// Bytes of shared memory that the kernel declares. What the system takes of each block is not among them.
    pub(crate) shared_bytes: u32,
    pub(crate) code: Vec<Instruction>,
}

#[derive(Clone, Debug)]
pub(crate) struct Instruction {
    pub(crate) address: u32,
    /// With its modifiers, as `LDG.E.NA.128.CONSTANT`.
    pub(crate) opcode: String,
    /// Where a branch goes.
    pub(crate) target: Option<u32>,
}

/// From where a branch goes back to, to that branch.
#[derive(Clone, Debug)]
pub(crate) struct Loop<'a>(pub(crate) &'a [Instruction]);

impl Compiled {
    /// The shortest loops that hold an instruction and have nothing in common, the shortest first. What is seldom needed
    /// stands behind the rest and branches back, which looks like a loop around what lies between.
    pub(crate) fn loops_with(&self, opcode: &str) -> Vec<Loop<'_>> {
        let at = |address: u32| self.code.partition_point(|instruction| instruction.address < address);
        let loops = self.code.iter().enumerate().filter_map(|(end, branch)| {
            let first = at(branch.target?);
            // A branch to itself is what ptxas puts behind the end.
            (first < end).then_some((first, end))
        });
        let mut loops =
            loops.filter(|(first, end)| count(&self.code[*first..=*end], opcode) > 0).collect::<Vec<_>>();
        loops.sort_by_key(|(first, end)| end - first);
        let mut apart: Vec<(usize, usize)> = Vec::new();
        for (first, end) in loops {
            if apart.iter().all(|other| end < other.0 || other.1 < first) {
                apart.push((first, end));
            }
        }
        apart.into_iter().map(|(first, end)| Loop(&self.code[first..=end])).collect()
    }

    /// Instructions of a kind with these modifiers: `LDG.128` counts `LDG.E.NA.128.CONSTANT`.
    pub(crate) fn count(&self, opcode: &str) -> usize {
        count(&self.code, opcode)
    }
}

impl Loop<'_> {
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn count(&self, opcode: &str) -> usize {
        count(self.0, opcode)
    }

    /// Instructions of a kind between the first and the last of another.
    pub(crate) fn between(&self, opcode: &str, fences: &str) -> usize {
        let is_fence = |instruction: &Instruction| is(instruction, fences);
        let (first, last) = (self.0.iter().position(is_fence), self.0.iter().rposition(is_fence));
        first.zip(last).map_or(0, |(first, last)| count(&self.0[first..last], opcode))
    }

    /// Instructions of a kind before the first of another.
    pub(crate) fn before(&self, opcode: &str, other: &str) -> usize {
        let end = self.0.iter().position(|instruction| is(instruction, other)).unwrap_or(self.len());
        count(&self.0[..end], opcode)
    }
}

fn count(code: &[Instruction], opcode: &str) -> usize {
    code.iter().filter(|instruction| is(instruction, opcode)).count()
}

fn is(instruction: &Instruction, opcode: &str) -> bool {
    let (kind, modifiers) = opcode.split_once('.').unwrap_or((opcode, ""));
    let mut parts = instruction.opcode.split('.');
    parts.next() == Some(kind)
        && modifiers.split('.').all(|wanted| wanted.is_empty() || parts.clone().any(|part| part == wanted))
}

/// Every kernel of a fatbin on every architecture that it has machine code for.
pub(crate) fn read(cuobjdump: &Path, fatbin: &Path) -> Vec<Compiled> {
    let resources = run(cuobjdump, &["--dump-resource-usage"], fatbin);
    let sass = run(cuobjdump, &["--dump-sass"], fatbin);
    let mut code = functions(&sass);
    let mut found = Vec::new();
    let (mut arch, mut entry) = ("", "");
    for line in resources.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("arch = ") {
            arch = name;
        } else if let Some(name) = line.strip_prefix("Function ") {
            entry = name.trim_end_matches(':');
        } else if line.starts_with("REG:") {
            let field = |name: &str| -> u32 {
                let value =
                    line.split_whitespace().find_map(|part| part.strip_prefix(name)?.strip_prefix(':'));
                value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {name} in: {line}"))
            };
            found.push(Compiled {
                arch: arch.into(),
                entry: entry.into(),
                registers: field("REG"),
                local_bytes: field("STACK") + field("LOCAL"),
                shared_bytes: field("SHARED").saturating_sub(if arch.starts_with("sm_90") {
                    1024
                } else {
                    0
                }),
                code: code
                    .remove(&(arch.into(), entry.into()))
                    .unwrap_or_else(|| panic!("no code of {entry}")),
            });
        }
    }
    found
}

fn functions(sass: &str) -> BTreeMap<(String, String), Vec<Instruction>> {
    let mut functions = BTreeMap::<_, Vec<_>>::new();
    let mut key = (String::new(), String::new());
    for line in sass.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("code for ") {
            key.0 = name.into();
        } else if let Some(name) = line.strip_prefix("Function : ") {
            key.1 = name.into();
        } else if let Some(instruction) = instruction(line) {
            functions.entry(key.clone()).or_default().push(instruction);
        }
    }
    functions
}

/// `/*0a30*/ @!P0 BRA 0x750 ;  /* 0xfffffffc00448947 */`
fn instruction(line: &str) -> Option<Instruction> {
    let (address, rest) = line.strip_prefix("/*")?.split_once("*/")?;
    let address = u32::from_str_radix(address, 16).ok()?;
    let text = rest.split(';').next()?;
    let mut words = text.split_whitespace().skip_while(|word| word.starts_with('@') || *word == "{");
    let opcode = words.next()?.to_string();
    let target = (opcode == "BRA" || opcode.starts_with("BRA."))
        .then(|| words.last().and_then(|word| u32::from_str_radix(word.strip_prefix("0x")?, 16).ok()))
        .flatten();
    Some(Instruction { address, opcode, target })
}

fn run(cuobjdump: &Path, arguments: &[&str], fatbin: &Path) -> String {
    // cuobjdump starts nvdisasm, which lies beside it.
    let folder = cuobjdump.parent().expect("a path with a folder");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path =
        std::env::join_paths(std::iter::once(folder.to_path_buf()).chain(std::env::split_paths(&path)));
    let output = Command::new(cuobjdump)
        .args(arguments)
        .arg(fatbin)
        .env("PATH", path.expect("a PATH that was one before"))
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}", cuobjdump.display()));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}
