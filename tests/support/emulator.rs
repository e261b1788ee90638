//! The PTX emulator as a device: drivers run the kernels that ship, without a GPU.

use std::{cell::RefCell, collections::BTreeSet, fmt, rc::Rc, sync::Mutex, time::Instant};

use fastkv::{
    abi::{self, Rows},
    kernels::{
        DType, Device, Error, Graph, Kernel, Launch, Launcher, Matmul, MatrixProduct, TensorMap, images,
    },
};
use ptx_emulator::{Counters, Schedule, Swizzle};

use super::number::{decode, encode};

/// Entries of kernels that any device of this program has launched, with the architecture of their code.
pub(crate) static LAUNCHED: Mutex<BTreeSet<(&str, &str)>> = Mutex::new(BTreeSet::new());

/// Clones are the same device.
#[derive(Clone)]
pub(crate) struct Emulator {
    device: Rc<RefCell<ptx_emulator::Device>>,
    compute_capability: (u32, u32),
    /// Images that were loaded, each before its first launch.
    loaded: Rc<RefCell<Vec<&'static str>>>,
    /// Of the last launch.
    counters: Rc<RefCell<Counters>>,
    /// What is queued while a piece of work is captured.
    captured: Rc<RefCell<Option<Vec<Queued>>>>,
}

/// What a captured piece does when it is launched.
#[derive(Clone, Debug)]
enum Queued {
    Copy { to: u64, from: u64, bytes: usize },
    Fill { to: u64, value: u8, bytes: usize },
    Launch { kernel: Kernel, sizes: [[u32; 3]; 3], shared_bytes: u32, params: Vec<u8> },
    Matmul(Matmul),
}

#[derive(Debug)]
struct Captured {
    device: Emulator,
    queued: Vec<Queued>,
}

impl Graph for Captured {
    unsafe fn launch(&self) -> Result<(), Error> {
        self.queued.iter().try_for_each(|queued| {
            // SAFETY: the caller's promise.
            unsafe {
                match queued {
                    Queued::Copy { to, from, bytes } => self.device.copy(*to, *from, *bytes),
                    Queued::Fill { to, value, bytes } => self.device.fill(*to, *value, *bytes),
                    Queued::Matmul(work) => self.device.matmul(work),
                    Queued::Launch { kernel, sizes: [grid, cluster, block], shared_bytes, params } => {
                        self.device.launch(&Launch {
                            kernel: *kernel,
                            grid: *grid,
                            cluster: *cluster,
                            block: *block,
                            shared_bytes: *shared_bytes,
                            params,
                        })
                    }
                }
            }
        })
    }
}

impl fmt::Debug for Emulator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an emulator of {:?}", self.compute_capability)
    }
}

impl Emulator {
    /// A device that claims a compute capability, in a build that has kernels.
    pub(crate) fn new(schedule: Schedule, compute_capability: (u32, u32)) -> Self {
        let mut device = ptx_emulator::Device::new();
        device.set_schedule(schedule);
        // Chips approximate in ways of their own.
        device.set_jitter(match schedule {
            Schedule::Random(seed) => Some(seed),
            _ => None,
        });
        // Tests run side by side.
        device.set_cores(1);
        Self {
            device: Rc::new(RefCell::new(device)),
            compute_capability,
            loaded: Rc::default(),
            counters: Rc::default(),
            captured: Rc::default(),
        }
    }

    /// Whether this is captured instead of done.
    fn captures(&self, queued: impl FnOnce() -> Queued) -> bool {
        self.captured.borrow_mut().as_mut().map(|captured| captured.push(queued())).is_some()
    }

    /// Fails where a graph would.
    fn not_captured(&self, operation: &'static str) -> Result<(), Error> {
        match *self.captured.borrow() {
            Some(_) => Err(Error::Device { operation, reason: "while work is captured".to_owned() }),
            None => Ok(()),
        }
    }

    /// What the last launch executed.
    pub(crate) fn counters(&self) -> Counters {
        *self.counters.borrow()
    }

    /// The newest architecture of an image that the chip runs; the first of all where a build has none for it.
    pub(crate) fn arch(&self, image: &str) -> Option<&'static str> {
        let (major, minor) = self.compute_capability;
        let number = |arch: &str| arch.trim_matches(|c: char| !c.is_ascii_digit()).parse::<u32>().ok();
        let archs = images::images().iter().find(|known| known.name == image)?.archs;
        let fits = archs.iter().filter(|arch| number(arch) <= Some(10 * major + minor));
        fits.max_by_key(|arch| number(arch)).or(archs.first()).copied()
    }

    fn load(&self, image: &'static str, arch: &str) {
        if !self.loaded.borrow().contains(&image) {
            let ptx = images::ptx(image, arch)
                .expect("PTX, which FASTKV_PTX=1 compiles: .cargo/config.toml sets it");
            self.device.borrow_mut().load(ptx).unwrap_or_else(|error| panic!("{image}, {arch}: {error}"));
            self.loaded.borrow_mut().push(image);
        }
    }
}

fn failed(operation: &'static str) -> impl Fn(ptx_emulator::Error) -> Error {
    move |error| Error::Device { operation, reason: error.to_string() }
}

impl Launcher for Emulator {
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), Error> {
        let Launch { kernel, grid, cluster, block, shared_bytes, params } = *launch;
        let sizes = [grid, cluster, block];
        if self.captures(|| Queued::Launch { kernel, sizes, shared_bytes, params: params.to_vec() }) {
            return Ok(());
        }
        let arch = self.arch(kernel.image()).expect("a build with kernels has every image");
        LAUNCHED.lock().expect("a lock").insert((kernel.entry(), arch));
        self.load(kernel.image(), arch);
        let launch =
            ptx_emulator::Launch { kernel: kernel.entry(), grid, cluster, block, shared_bytes, params };
        *self.counters.borrow_mut() = self.device.borrow_mut().launch(&launch).map_err(failed("launch"))?;
        Ok(())
    }

    unsafe fn fill(&self, to: u64, value: u8, bytes: usize) -> Result<(), Error> {
        if self.captures(|| Queued::Fill { to, value, bytes }) {
            return Ok(());
        }
        self.device.borrow_mut().fill(to, value, bytes).map_err(failed("fill"))
    }

    fn tensor_map(&self, tensor: &TensorMap) -> Result<abi::TensorMap, Error> {
        let map = ptx_emulator::TensorMap {
            address: tensor.base,
            element_bytes: tensor.dtype.bytes(),
            sizes: &tensor.sizes,
            strides: &tensor.strides,
            box_sizes: &tensor.box_sizes,
            swizzle: Swizzle::Bytes128,
        };
        let words = bytemuck::cast(map.encode().map_err(failed("tensor_map"))?);
        Ok(abi::TensorMap { words })
    }

    fn compute_capability(&self) -> (u32, u32) {
        self.compute_capability
    }

    fn multiprocessors(&self) -> u32 {
        4
    }
}

impl Device for Emulator {
    type Event = Instant;

    fn alloc(&self, bytes: usize) -> Result<u64, Error> {
        self.not_captured("alloc")?;
        Ok(self.device.borrow_mut().alloc(bytes))
    }

    unsafe fn free(&self, address: u64) -> Result<(), Error> {
        self.not_captured("free")?;
        self.device.borrow_mut().free(address).map_err(failed("free"))
    }

    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<(), Error> {
        self.not_captured("upload")?;
        self.device.borrow_mut().write(to, from).map_err(failed("upload"))
    }

    unsafe fn download(&self, to: &mut [u8], from: u64) -> Result<(), Error> {
        self.not_captured("download")?;
        let bytes = self.device.borrow().read(from, to.len()).map_err(failed("download"))?;
        to.copy_from_slice(&bytes);
        Ok(())
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error> {
        if self.captures(|| Queued::Copy { to, from, bytes }) {
            return Ok(());
        }
        let mut device = self.device.borrow_mut();
        let read = device.read(from, bytes).map_err(failed("copy"))?;
        device.write(to, &read).map_err(failed("copy"))
    }

    unsafe fn capture(
        &self,
        work: &mut dyn FnMut() -> Result<(), Error>,
    ) -> Result<Option<Box<dyn Graph>>, Error> {
        *self.captured.borrow_mut() = Some(Vec::new());
        let done = work();
        let queued = self.captured.take().unwrap_or_default();
        done?;
        Ok(Some(Box::new(Captured { device: self.clone(), queued })))
    }

    fn synchronize(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Everything is done at once.
    fn record(&self) -> Result<Instant, Error> {
        Ok(Instant::now())
    }

    fn elapsed_ms(&self, from: &Instant, to: &Instant) -> Result<f32, Error> {
        Ok(to.duration_since(*from).as_secs_f32() * 1e3)
    }
}

/// Plain loops on the host.
impl MatrixProduct for Emulator {
    fn matmul_workspace(&self) -> Result<usize, Error> {
        Ok(256)
    }

    unsafe fn matmul(&self, work: &Matmul) -> Result<(), Error> {
        if !work.check()? || self.captures(|| Queued::Matmul(*work)) {
            return Ok(());
        }
        let Matmul { rows, columns, inner, dtype, out_dtype, .. } = *work;
        let read = |address, count: u32, dtype: DType| {
            let bytes = self.device.borrow().read(address, count as usize * dtype.bytes() as usize);
            Ok(decode(dtype, &bytes.map_err(failed("matmul"))?))
        };
        let row_of = |matrix: &Rows, row: u32, dtype: DType| {
            matrix.base + u64::from(row) * matrix.token_stride as u64 * u64::from(dtype.bytes())
        };
        let weight = (0..columns).map(|column| read(row_of(&work.weight, column, dtype), inner, dtype));
        let weight = weight.collect::<Result<Vec<_>, Error>>()?;
        let bias = match work.bias {
            0 => vec![0.0; columns as usize],
            address => read(address, columns, out_dtype)?,
        };
        for row in 0..rows {
            let x = read(row_of(&work.x, row, dtype), inner, dtype)?;
            let out = row_of(&work.out, row, out_dtype);
            let before = match work.accumulate {
                true => read(out, columns, out_dtype)?,
                false => vec![0.0; columns as usize],
            };
            let sums = weight.iter().zip(&bias).zip(&before).map(|((weight, bias), before)| {
                weight.iter().zip(&x).map(|(weight, x)| weight * x).sum::<f64>() + bias + before
            });
            self.device.borrow_mut().write(out, &encode(out_dtype, sums)).map_err(failed("matmul"))?;
        }
        Ok(())
    }
}
