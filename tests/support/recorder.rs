//! A device that writes down launches and has no memory: for what drivers launch, and what they refuse.

use std::cell::RefCell;

use fastkv::{
    abi,
    kernels::{Error, Kernel, Launch, Launcher, TensorMap},
};

#[derive(Default)]
pub(crate) struct Recorder {
    fails: bool,
    /// Ampere's where there is none.
    compute_capability: Option<(u32, u32)>,
    launches: RefCell<Vec<Recorded>>,
    fills: RefCell<Vec<(u64, usize)>>,
    resources: RefCell<Vec<Resources>>,
    maps: RefCell<Vec<TensorMap>>,
}

/// A launch, parameters included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Recorded {
    pub(crate) kernel: Kernel,
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) params: Vec<u8>,
}

/// What a launch asked for besides blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Resources {
    pub(crate) cluster: [u32; 3],
    pub(crate) shared_bytes: u32,
}

impl Recorder {
    /// Claims a compute capability.
    pub(crate) fn of(compute_capability: (u32, u32)) -> Self {
        Self { compute_capability: Some(compute_capability), ..Self::default() }
    }

    pub(crate) fn hopper() -> Self {
        Self::of((9, 0))
    }

    /// Fails every launch as a GPU would.
    pub(crate) fn failing() -> Self {
        Self { fails: true, ..Self::default() }
    }

    /// The launches so far.
    pub(crate) fn launches(&self) -> Vec<Recorded> {
        self.launches.borrow().clone()
    }

    /// Where bytes were set, and how many.
    pub(crate) fn fills(&self) -> Vec<(u64, usize)> {
        self.fills.borrow().clone()
    }

    /// What the launches so far asked for.
    pub(crate) fn resources(&self) -> Vec<Resources> {
        self.resources.borrow().clone()
    }

    /// The tensors that were described so far.
    pub(crate) fn maps(&self) -> Vec<TensorMap> {
        self.maps.borrow().clone()
    }

    /// The last launch.
    pub(crate) fn last(&self) -> Recorded {
        self.launches.borrow().last().expect("a launch").clone()
    }

    /// That a driver refuses work that was changed, says this of it, and launches nothing.
    pub(crate) fn refuses<W>(
        driver: unsafe fn(&Self, &W) -> Result<(), Error>,
        mut work: W,
        change: impl FnOnce(&mut W),
        message: &str,
    ) {
        let recorder = Self::default();
        change(&mut work);
        // SAFETY: the recorder touches no memory.
        let error = unsafe { driver(&recorder, &work) }.expect_err(message);
        assert_eq!(error.to_string(), message);
        assert!(recorder.launches().is_empty(), "{message}");
    }
}

impl Launcher for Recorder {
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), Error> {
        let Launch { kernel, grid, cluster, block, shared_bytes, .. } = *launch;
        assert!((0..3).all(|axis| grid[axis].is_multiple_of(cluster[axis])), "{launch:?}");
        assert!(grid.iter().chain(&block).all(|n| *n > 0), "{launch:?}");
        assert!(grid[0] < 1 << 31 && grid[1] < 1 << 16 && grid[2] < 1 << 16, "{launch:?}");
        assert!(block.iter().product::<u32>() <= 1024, "{launch:?}");
        if self.fails {
            return Err(launch.failed(719));
        }
        self.resources.borrow_mut().push(Resources { cluster, shared_bytes });
        self.launches.borrow_mut().push(Recorded { kernel, grid, block, params: launch.params.to_vec() });
        Ok(())
    }

    unsafe fn fill(&self, address: u64, _: u8, bytes: usize) -> Result<(), Error> {
        self.fills.borrow_mut().push((address, bytes));
        Ok(())
    }

    /// What tells it from other tensors: its address.
    fn tensor_map(&self, tensor: &TensorMap) -> Result<abi::TensorMap, Error> {
        self.maps.borrow_mut().push(*tensor);
        let mut map = abi::TensorMap::default();
        map.words[0] = tensor.base;
        Ok(map)
    }

    fn compute_capability(&self) -> (u32, u32) {
        self.compute_capability.unwrap_or((8, 0))
    }

    fn multiprocessors(&self) -> u32 {
        108
    }
}
