//! Instructions that all lanes of a warp must execute together: each at one place, which is right, and in two
//! halves of the warp at two places, which is not.

use ptx_emulator::{Device, Error, Hazard, Launch, Schedule};

const SCHEDULES: [Schedule; 4] =
    [Schedule::Eager, Schedule::Delayed, Schedule::Random(1), Schedule::Random(2)];

fn run(schedule: Schedule, before: &str, instruction: &str, parts: bool) -> Result<(), Error> {
    let branch = if parts { "@%half bra OTHER;" } else { "" };
    let mut device = Device::new();
    device.set_schedule(schedule);
    device.load(&format!(
        ".version 9.0\n.target sm_90a\n.address_size 64\n.visible .entry k()\n.maxntid 128, 1, 1\n{{\n\
         .reg .b32 %r<8>, %row; .reg .b64 %d; .reg .f32 %f<4>; .reg .pred %half, %p; .shared .align 1024 .b8 box[4096];\n\
         mov.u32 %r0, %tid.x; and.b32 %r1, %r0, 16; setp.eq.u32 %half, %r1, 0; mul.lo.u32 %row, %r0, 16;\n\
         st.shared.v4.u32 [%row], {{%r0, %r0, %r0, %r0}}; st.shared.v4.u32 [%row+2048], {{%r0, %r0, %r0, %r0}};\n\
         mov.b32 %r2, 0; mov.b32 %r3, 0; mov.b32 %r4, 0; mov.b32 %r5, 0; mov.f32 %f0, 0f00000000; mov.f32 %f1, %f0;\n\
         mov.f32 %f2, %f0; mov.f32 %f3, %f0; mov.b64 %d, 0x4000004000010000; fence.proxy.async; bar.sync 0;\n\
         {before}\n{branch}\n{instruction}\nbra END;\nOTHER: {instruction}\nEND: ret;\n}}"
    ))?;
    let (grid, block) = ([1; 3], [128, 1, 1]);
    device
        .launch(&Launch { kernel: "k", grid, cluster: [1; 3], block, shared_bytes: 0, params: &[] })
        .map(drop)
}

#[test]
fn aligned_instructions() {
    for (before, instruction) in [
        ("", "bar.sync 0;"),
        ("", "bar.arrive 1, 128;"),
        ("", "barrier.cta.sync.aligned 1, 128;"),
        ("", "barrier.cta.red.popc.aligned.u32 %r1, 0, %half;"),
        ("", "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire;"),
        ("barrier.cluster.arrive.release.aligned;", "barrier.cluster.wait.acquire.aligned;"),
        ("", "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%row];"),
        ("", "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%row], {%r1};"),
        ("", "movmatrix.sync.aligned.m8n8.trans.b16 %r1, %r2;"),
        (
            "",
            "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%f0, %f1, %f2, %f3}, {%r2, %r3}, {%r4}, {%f0, %f1, %f2, %f3};",
        ),
        ("", "wgmma.fence.sync.aligned;"),
        ("", "wgmma.commit_group.sync.aligned;"),
        ("", "wgmma.wait_group.sync.aligned 0;"),
        (
            "wgmma.fence.sync.aligned;",
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, {%r2, %r3, %r4, %r5}, %d, 1, 1, 1, 0;\n\
             wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;",
        ),
        ("", "setmaxnreg.dec.sync.aligned.u32 40;"),
    ] {
        for schedule in SCHEDULES {
            run(schedule, before, instruction, false).unwrap_or_else(|error| panic!("{schedule:?}: {error}"));
            match run(schedule, before, instruction, true) {
                Err(Error::Fault(fault)) => {
                    assert_eq!(fault.hazard, Hazard::NotConverged, "{schedule:?}: {fault}");
                    // Where both halves stand.
                    assert_eq!(fault.message.matches("threads at line").count(), 2, "{schedule:?}: {fault}");
                }
                other => panic!("{schedule:?} {instruction}: {other:?}"),
            }
        }
    }
}
