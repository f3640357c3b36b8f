use super::super::Named;
use super::backward_data::ThreeByThree;
use super::backward_filter::Strips;
use super::gradient::{Parts, Room};
use super::{BackwardData, BackwardFilter};
use crate::cuda::{Address, CudaElement};
use crate::{Cuda, Result};

/// Both gradients of a 3x3 convolution, from one of its output that is formed once: as many images at a time as stay in the
/// L2 until both kernels have read them, so that it takes no memory. By the time that forming alone took on an H200, for
/// 256 images at 56, 28, 14 and 7 pixels that is 0.080, 0.043, 0.023 and 0.013 ms less, 0.59 in a step of a ResNet-50.
///
/// Those of 1x1 filters form it in shared memory, each for itself: backward data that also stored it took longer by 0.035,
/// 0.015, 0.003 and 0.003 ms, and the filter's would save the reading of a tensor, at 4.8 TB/s 0.021, 0.011, 0.005 and
/// 0.003.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Backward {
    data: BackwardData,
    filter: BackwardFilter,
    way: ThreeByThree,
    strips: Strips,
    parts: Parts,
    order: Order,
}

/// How the two kernels of a part run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    InTurn,
    /// Each on multiprocessors of its own.
    Beside,
}

impl Backward {
    /// The ways to do it, the rule's first; none where there is nothing to be done once, or no kernels take it.
    pub(in super::super) fn ways<T: CudaElement>(cuda: &Cuda, data: BackwardData, filter: BackwardFilter) -> Vec<Self> {
        if data.dy.coef == Address::NONE {
            return Vec::new();
        }
        let (ways, all_strips) = (data.three_by_three::<T>(cuda), filter.strips::<T>(cuda));
        let both = |order, way, strips: Strips| {
            let room = Room::behind(cuda, strips.workspace_bytes());
            // What is whole for the filter's gradient is so for the input's.
            let parts = Parts::of(cuda, &data.dims, data.dy, strips.whole_images(), room)?;
            Some(Self { data, filter, way, strips, parts, order })
        };
        let beside = ways.first().and_then(|way| {
            let strips = filter.strips_on::<T>(cuda, multiprocessors_left(cuda, data.blocks(cuda, way, data.dims.n))?);
            both(Order::Beside, *way, *strips.first()?)
        });
        let pairs = ways.iter().flat_map(|&way| all_strips.iter().map(move |&strips| (way, strips)));
        beside.into_iter().chain(pairs.map_while(|(way, strips)| both(Order::InTurn, way, strips))).collect()
    }

    /// Queues the kernels.
    pub(in super::super) fn launch<T: CudaElement>(&self, cuda: &Cuda) -> Result<()> {
        let Self { data, filter, way, strips, parts, order } = self;
        parts.each::<T>(cuda, |first, part, dy| {
            let of_filter = || {
                filter.launch_strips_of::<T>(cuda, strips, (first, part), dy)?;
                if first + part.n == data.dims.n { strips.add(cuda) } else { Ok(()) }
            };
            let of_data = || data.launch_part::<T>(cuda, way, (first, part), dy);
            match order {
                Order::InTurn => of_filter().and_then(|()| of_data()),
                // Sums, and the formed gradient that both read, have a part of the workspace each; the other kernel needs none.
                Order::Beside => cuda.beside(of_filter, of_data),
            }
        })
    }
}

impl Named for Backward {
    fn name(&self) -> String {
        let beside = if self.order == Order::Beside { ", beside each other" } else { "" };
        format!("hopper_{}, {}{beside}", self.way.name(), self.strips.name())
    }
}

/// How many multiprocessors the filter's gradient has where the input's runs beside it, of so many blocks; [`None`] where
/// they run in turn. Both have the same products to make. Alone the filter's takes the whole device, by as many splits as it
/// needs; the other one, of `b` of `m` multiprocessors, takes `m / b` times as long. If `b` is at most half of them, the rest
/// has made the filter's gradient by the time that the input's is done, so that it takes no time of its own.
fn multiprocessors_left(cuda: &Cuda, blocks: usize) -> Option<usize> {
    let multiprocessors = cuda.facts().multiprocessors;
    (2 * blocks <= multiprocessors).then(|| multiprocessors - blocks)
}

#[cfg(test)]
mod tests {
    use super::super::super::{backward_data, backward_filter};
    use super::*;
    use crate::ConvDims;
    use crate::norm_relu_conv::{Backward as Args, BackwardData as DataArgs};
    use crate::testing::{Draws, Guarded, HostGrad, TestDevice, bits, read_partials, room};
    use half::bf16;

    /// Both gradients and the sums, with the kernels in this order; and the rule's order.
    fn both(device: &Cuda, dims: ConvDims, order: Order) -> (Vec<u8>, Order) {
        let mut draws = Draws::new(3);
        let mut draw = |len| Guarded::<Cuda, bf16>::new(device, &draws.values(len));
        let [x, w] = [dims.len_in(), dims.len_filter()].map(&mut draw);
        let [dz, raw] = [dims.len_out(); 2].map(|len| Draws::new(len as u64).values(len));
        let dy = HostGrad::<bf16>::Affine { dz, x: raw, coef: draws.values(3 * dims.k) }.upload(device);
        let norm = Guarded::<Cuda, f32>::new(device, &draws.values(4 * dims.c));
        let mut dz = Guarded::<Cuda, bf16>::poisoned(device, dims.len_in());
        let mut dw = Guarded::<Cuda, f32>::poisoned(device, dims.len_filter());
        let mut sums = room(device, dims.rows_in(), dims.c);
        let data = DataArgs {
            dims,
            dy: dy.view(),
            w: w.view(),
            x: x.view(),
            norm: norm.view(),
            addend: None,
            dz: dz.view_mut(),
            sums: &mut sums,
        };
        let (filter, mut data) = Args { data, dw: dw.view_mut() }.passes();
        let (_, data) = backward_data::ways(&mut data).expect("dims that fit");
        let ways = Backward::ways::<bf16>(device, data, backward_filter::for_hopper(&filter));
        let rule = *ways.first().expect("kernels that take it");
        Backward { order, ..rule }.launch::<bf16>(device).expect("it is launched");
        let written = [bits(&dw.read(device)), bits(&dz.read(device)), bits(&read_partials(device, &sums).1)].concat();
        (written, rule.order)
    }

    #[test]
    #[ignore = "takes a CUDA device, or the emulator"]
    fn beside_each_other_is_as_in_turn() {
        let device = &Cuda::larger();
        if !device.facts().hopper {
            eprintln!("not tried: the device has no such kernels");
            return;
        }
        let few_tiles = ConvDims { n: 5, h: 6, w: 8, c: 64, k: 128, r: 3, s: 3, stride: 1, pad: 1 };
        // The emulator has too little L2 for all of it at once, and seven multiprocessors.
        let in_parts = ConvDims { n: 19, h: 8, w: 8, k: 64, ..few_tiles };
        for dims in [few_tiles, in_parts] {
            let (in_turn, rule) = both(device, dims, Order::InTurn);
            assert!(dims == in_parts || rule == Order::Beside, "{dims}: two blocks leave room");
            for _ in 0..4 {
                assert!(both(device, dims, Order::Beside).0 == in_turn, "{dims}");
            }
        }
    }

    #[test]
    #[ignore = "takes a CUDA device, or the emulator"]
    fn few_blocks_leave_room() {
        let device = &Cuda::larger();
        let multiprocessors = device.facts().multiprocessors;
        assert_eq!(multiprocessors_left(device, multiprocessors / 2), Some(multiprocessors.div_ceil(2)));
        assert_eq!(multiprocessors_left(device, multiprocessors / 2 + 1), None);
    }
}
