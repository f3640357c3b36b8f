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
}

impl Backward {
    /// The ways to do it, the rule's first; none where there is nothing to be done once, or no kernels take it.
    pub(in super::super) fn ways<T: CudaElement>(cuda: &Cuda, data: BackwardData, filter: BackwardFilter) -> Vec<Self> {
        if data.dy.coef == Address::NONE {
            return Vec::new();
        }
        let (ways, all_strips) = (data.three_by_three::<T>(cuda), filter.strips::<T>(cuda));
        let pairs = ways.into_iter().flat_map(|way| all_strips.iter().map(move |&strips| (way, strips)));
        let both = |(way, strips): (ThreeByThree, Strips)| {
            let room = Room::behind(cuda, strips.workspace_bytes());
            // What is whole for the filter's gradient is so for the input's.
            let parts = Parts::of(cuda, &data.dims, data.dy, strips.whole_images(), room)?;
            Some(Self { data, filter, way, strips, parts })
        };
        pairs.map_while(both).collect()
    }

    /// Queues the kernels.
    pub(in super::super) fn launch<T: CudaElement>(&self, cuda: &Cuda) -> Result<()> {
        let Self { data, filter, way, strips, parts } = self;
        parts.each::<T>(cuda, |first, part, dy| {
            filter.launch_strips_of::<T>(cuda, strips, (first, part), dy)?;
            data.launch_part::<T>(cuda, way, (first, part), dy)
        })?;
        strips.add(cuda)
    }
}

impl Named for Backward {
    fn name(&self) -> String {
        format!("hopper_{}, {}", self.way.name(), self.strips.name())
    }
}
