//! The prefetching loader: batches made ahead on threads of its own, handed out in order.
//!
//! Step k is made by worker (k - first) mod n, and every worker has its own bounded channel, which
//! the consumer reads in turn: the order needs no sorting, and what a batch holds cannot depend on
//! the number of workers.

use std::any::Any;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use fast_image_resize::Resizer;

use crate::augment::{Augment, Draw, Framing};
use crate::dataset::Dataset;
use crate::draws::Draws;
use crate::error::{BadFile, Error, Result};
use crate::stream::EpochStream;

/// Label of an image that has none.
pub const UNLABELLED: u32 = u32::MAX;

/// Fraction of bad images that is allowed unless asked otherwise.
pub const DEFAULT_MAX_BAD: f64 = 0.01;

/// How many of `images` may be bad where the fraction `max_bad` may: rounded up to whole images.
pub fn allowed_bad(images: usize, max_bad: f64) -> usize {
    (max_bad * images as f64).ceil() as usize
}

/// How a loader works.
#[derive(Clone, Copy, Debug)]
pub struct LoaderConfig {
    /// Images per batch.
    pub batch: usize,
    /// Side of the square images that come out.
    pub size: usize,
    /// Threads; 0 makes every batch when it is asked for.
    pub workers: usize,
    /// Finished batches waiting, over all workers; at least one per worker.
    pub depth: usize,
    /// Fraction of the dataset's images that may be bad ([`allowed_bad`]).
    pub max_bad: f64,
}

impl LoaderConfig {
    /// One worker, two batches ahead, [`DEFAULT_MAX_BAD`].
    pub fn new(batch: usize, size: usize) -> Self {
        Self { batch, size, workers: 1, depth: 2, max_bad: DEFAULT_MAX_BAD }
    }
}

/// A batch of n images, always full; give it back with `recycle` when done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Number of the batch: the training step, or the place in the evaluation.
    pub step: u64,
    /// [n, size, size, 3], RGB.
    pub images: Vec<u8>,
    /// `[n]`; [`UNLABELLED`] where there is none.
    pub labels: Vec<u32>,
    /// `[n]`, indices in the dataset (of the image that is really there, if a bad one was replaced).
    pub indices: Vec<u64>,
    /// `[n]`, what the kernels still have to do.
    pub draws: Vec<Draw>,
    /// `[n, patches]`, what [`Draws::append_order`] gave.
    pub orders: Vec<u32>,
    /// Images that count: n in training. In evaluation those after it are padding: black, label
    /// [`UNLABELLED`], index `u64::MAX`.
    pub valid: usize,
}

/// Endless batches of training, in the order of an [`EpochStream`].
pub struct TrainLoader(Pipeline);

impl TrainLoader {
    /// Batches from `first_step` on: the same as a loader from step 0 gives from there.
    /// A bad image is replaced by the next good one of its epoch, and recorded.
    ///
    /// # Errors
    /// [`Error::Usage`] for a batch or size of 0.
    pub fn new(
        dataset: Arc<dyn Dataset>,
        stream: Arc<EpochStream>,
        draws: Arc<dyn Draws>,
        augment: Augment,
        config: LoaderConfig,
        first_step: u64,
    ) -> Result<Self> {
        let order = Order::Endless(stream);
        Ok(Self(Pipeline::new(Job::new(dataset, order, draws, augment, config)?, first_step)))
    }

    /// The next batch; waits for it.
    ///
    /// # Errors
    /// [`Error::TooManyBad`], [`Error::Read`] when the data went away, or [`Error::Worker`] when a
    /// thread panicked; after an error the loader gives nothing more.
    pub fn next_batch(&mut self) -> Result<Batch> {
        self.0.next_batch()?.ok_or_else(|| Error::Worker { message: "it was stopped by an earlier error".into() })
    }

    /// Takes a batch back, so that its buffers are used again.
    pub fn recycle(&mut self, batch: Batch) {
        self.0.recycle(batch);
    }

    /// The bad images met so far, each once.
    pub fn bad_files(&self) -> &[BadFile] {
        &self.0.bad
    }

    /// Counts bad images that were met before, by an earlier process of the same run.
    pub fn recall_bad(&mut self, bad: impl IntoIterator<Item = BadFile>) {
        for file in bad {
            if self.0.bad_indices.insert(file.index) {
                self.0.bad.push(file);
            }
        }
    }
}

/// One pass over some images in a fixed order; the last batch is padded.
pub struct EvalLoader(Pipeline);

impl EvalLoader {
    /// Batches over `items`, indices of `dataset`. A bad image is left out, and recorded: its
    /// batch has one valid image less.
    ///
    /// # Errors
    /// [`Error::Usage`] for a batch or size of 0.
    pub fn new(
        dataset: Arc<dyn Dataset>,
        items: Vec<usize>,
        draws: Arc<dyn Draws>,
        config: LoaderConfig,
    ) -> Result<Self> {
        let job = Job::new(dataset, Order::Once(items), draws, Augment::Eval, config)?;
        Ok(Self(Pipeline::new(job, 0)))
    }

    /// The next batch, or `None` after the last.
    ///
    /// # Errors
    /// As [`TrainLoader::next_batch`].
    pub fn next_batch(&mut self) -> Result<Option<Batch>> {
        self.0.next_batch()
    }

    /// Takes a batch back, so that its buffers are used again.
    pub fn recycle(&mut self, batch: Batch) {
        self.0.recycle(batch);
    }

    /// The bad images met so far, each once.
    pub fn bad_files(&self) -> &[BadFile] {
        &self.0.bad
    }
}

enum Order {
    Endless(Arc<EpochStream>),
    Once(Vec<usize>),
}

/// Everything that decides what a batch holds.
struct Job {
    dataset: Arc<dyn Dataset>,
    order: Order,
    draws: Arc<dyn Draws>,
    framing: Framing,
    config: LoaderConfig,
    /// Bad images allowed.
    allowed: usize,
    stopped: AtomicBool,
}

/// A batch, and the bad images met while making it.
struct Made {
    batch: Batch,
    bad: Vec<BadFile>,
    /// Why there will be no more: the data went away.
    gone: Option<Error>,
}

impl Job {
    fn new(
        dataset: Arc<dyn Dataset>,
        order: Order,
        draws: Arc<dyn Draws>,
        augment: Augment,
        config: LoaderConfig,
    ) -> Result<Self> {
        for (what, given) in [("batch", config.batch), ("image size", config.size)] {
            if given == 0 {
                return Err(Error::usage(what, given, "1 or more"));
            }
        }
        if !(0.0..=1.0).contains(&config.max_bad) {
            return Err(Error::usage("max-bad", config.max_bad, "a fraction from 0 to 1"));
        }
        let allowed = allowed_bad(dataset.len(), config.max_bad);
        let framing = Framing { size: config.size, augment };
        Ok(Self { dataset, order, draws, framing, config, allowed, stopped: AtomicBool::new(false) })
    }

    /// Number of batches; training has no end.
    fn end(&self) -> u64 {
        match &self.order {
            Order::Endless(_) => u64::MAX,
            Order::Once(items) => items.len().div_ceil(self.config.batch) as u64,
        }
    }

    fn make(&self, step: u64, mut batch: Batch, resizer: &mut Resizer) -> Made {
        let n = self.config.batch;
        let image_bytes = self.config.size * self.config.size * 3;
        batch.step = step;
        batch.images.resize(n * image_bytes, 0);
        batch.labels.clear();
        batch.indices.clear();
        batch.draws.clear();
        batch.orders.clear();
        let (mut bad, mut gone) = (Vec::new(), None);
        for place in 0..n as u64 {
            if self.stopped.load(Ordering::Relaxed) {
                break;
            }
            let sample = step * n as u64 + place;
            let slot = batch.labels.len();
            let pixels = &mut batch.images[slot * image_bytes..][..image_bytes];
            let placed = match self.place(sample, pixels, resizer, &mut bad) {
                Ok(placed) => placed,
                Err(error) => {
                    gone = Some(error);
                    break;
                }
            };
            let Some((index, draw)) = placed else { continue };
            batch.labels.push(self.dataset.label(index).unwrap_or(UNLABELLED));
            batch.indices.push(index as u64);
            batch.draws.push(draw);
            self.append_order(sample, index as u64, &mut batch.orders);
        }
        batch.valid = batch.labels.len();
        batch.images[batch.valid * image_bytes..].fill(0);
        batch.labels.resize(n, UNLABELLED);
        batch.indices.resize(n, u64::MAX);
        batch.draws.resize(n, Draw::default());
        for _ in batch.valid..n {
            self.append_order(u64::MAX, u64::MAX, &mut batch.orders);
        }
        Made { batch, bad, gone }
    }

    fn append_order(&self, sample: u64, index: u64, orders: &mut Vec<u32>) {
        match self.order {
            Order::Endless(_) => self.draws.append_order(sample, orders),
            Order::Once(_) => self.draws.append_order(index, orders),
        }
    }

    /// Writes the image of sample number `sample`, or of the one that stands in for it. An error when the data are gone.
    fn place(
        &self,
        sample: u64,
        pixels: &mut [u8],
        resizer: &mut Resizer,
        bad: &mut Vec<BadFile>,
    ) -> Result<Option<(usize, Draw)>> {
        let tries = match &self.order {
            Order::Endless(stream) => stream.epoch_len(),
            Order::Once(_) => 1,
        };
        for ahead in 0..tries {
            let index = match &self.order {
                Order::Endless(stream) => stream.neighbour(sample, ahead),
                Order::Once(items) => match items.get(sample as usize) {
                    Some(&index) => index,
                    None => return Ok(None),
                },
            };
            match self.framing.write(&*self.dataset, index, &*self.draws, sample, resizer, pixels) {
                Ok(draw) => return Ok(Some((index, draw))),
                Err(error) => {
                    self.dataset.check_there()?;
                    if !bad.iter().any(|known| known.index == index) {
                        bad.push(BadFile::new(&*self.dataset, index, error));
                    }
                    // The consumer will refuse the batch: no need to look further.
                    if bad.len() > self.allowed {
                        return Ok(None);
                    }
                }
            }
        }
        Ok(None)
    }
}

/// One worker as the consumer sees it.
struct Worker {
    made: Receiver<Made>,
    spare: Sender<Batch>,
    thread: JoinHandle<()>,
}

struct Pipeline {
    job: Arc<Job>,
    first: u64,
    next: u64,
    workers: Vec<Worker>,
    /// For `workers = 0`.
    resizer: Resizer,
    spare: Vec<Batch>,
    bad: Vec<BadFile>,
    bad_indices: HashSet<usize>,
}

impl Pipeline {
    fn new(job: Job, first: u64) -> Self {
        let job = Arc::new(job);
        let config = job.config;
        let count = (config.workers as u64).min(job.end() - first.min(job.end()));
        let workers = (0..count).map(|worker| {
            // One batch more than the channel holds is always in the making.
            let (send, made) = sync_channel(config.depth.div_ceil(config.workers).max(1));
            let (spare, spares) = channel();
            let job = job.clone();
            let thread = std::thread::spawn(move || work(&job, first + worker, count, &send, &spares));
            Worker { made, spare, thread }
        });
        let workers = workers.collect();
        Self {
            job,
            first,
            next: first,
            workers,
            resizer: Resizer::new(),
            spare: Vec::new(),
            bad: Vec::new(),
            bad_indices: HashSet::new(),
        }
    }

    fn next_batch(&mut self) -> Result<Option<Batch>> {
        if self.next >= self.job.end() || self.job.stopped.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let Made { batch, bad, gone } = if self.job.config.workers == 0 {
            self.job.make(self.next, self.spare.pop().unwrap_or_default(), &mut self.resizer)
        } else {
            let worker = self.worker_of(self.next);
            match self.workers[worker].made.recv() {
                Ok(made) => made,
                Err(_) => return Err(self.fail(worker)),
            }
        };
        if let Some(error) = gone {
            self.job.stopped.store(true, Ordering::Relaxed);
            return Err(error);
        }
        for file in bad {
            if self.bad_indices.insert(file.index) {
                self.bad.push(file);
            }
        }
        let none_left = matches!(self.job.order, Order::Endless(_)) && batch.valid < self.job.config.batch;
        if self.bad.len() > self.job.allowed || none_left {
            self.job.stopped.store(true, Ordering::Relaxed);
            let first = self.bad.first().cloned().expect("only bad images leave a batch short");
            return Err(Error::TooManyBad {
                bad: self.bad.len(),
                total: self.job.dataset.len(),
                max_bad: self.job.config.max_bad,
                first,
            });
        }
        self.next += 1;
        Ok(Some(batch))
    }

    fn worker_of(&self, step: u64) -> usize {
        ((step - self.first) % self.workers.len() as u64) as usize
    }

    fn recycle(&mut self, batch: Batch) {
        if self.workers.is_empty() {
            self.spare.push(batch);
        } else if batch.step >= self.first {
            // A worker that has ended needs no buffers.
            let _ = self.workers[self.worker_of(batch.step)].spare.send(batch);
        }
    }

    /// The error of a worker that ended without its batch.
    fn fail(&mut self, worker: usize) -> Error {
        self.job.stopped.store(true, Ordering::Relaxed);
        let message = match self.workers.swap_remove(worker).thread.join() {
            Ok(()) => "it ended early".to_string(),
            Err(panic) => panic_message(&*panic),
        };
        Error::Worker { message }
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        self.job.stopped.store(true, Ordering::Relaxed);
        for Worker { made, spare, thread } in self.workers.drain(..) {
            // Without a receiver the worker's next send fails, and it ends.
            drop((made, spare));
            // Its panic, if any, has no one left to tell.
            let _ = thread.join();
        }
    }
}

/// A worker's life: every `stride`-th batch from `first` on.
fn work(job: &Job, first: u64, stride: u64, made: &SyncSender<Made>, spares: &Receiver<Batch>) {
    let mut resizer = Resizer::new();
    let mut step = first;
    while step < job.end() && !job.stopped.load(Ordering::Relaxed) {
        let batch = job.make(step, spares.try_recv().unwrap_or_default(), &mut resizer);
        if made.send(batch).is_err() {
            return;
        }
        step += stride;
    }
}

/// The text of a panic.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("it panicked").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Plain, seeded};

    fn config(workers: usize) -> LoaderConfig {
        LoaderConfig { workers, depth: 3, max_bad: 0.1, ..LoaderConfig::new(4, 2) }
    }

    fn train(dataset: Plain, workers: usize, first_step: u64) -> TrainLoader {
        let stream = EpochStream::over_all(dataset.len(), seeded(7)).expect("not empty");
        TrainLoader::new(Arc::new(dataset), Arc::new(stream), seeded(7), Augment::Train, config(workers), first_step)
            .expect("a good configuration")
    }

    fn take(loader: &mut TrainLoader, count: usize) -> Vec<Batch> {
        let mut batches = Vec::new();
        for _ in 0..count {
            let batch = loader.next_batch().expect("few bad images");
            batches.push(batch.clone());
            loader.recycle(batch);
        }
        batches
    }

    fn with_bad() -> Plain {
        Plain { bad: vec![3, 12], ..Plain::new(30) }
    }

    #[test]
    fn batches_do_not_depend_on_workers() {
        let expected = take(&mut train(with_bad(), 0, 0), 40);
        for workers in [1, 2, 3, 8] {
            assert_eq!(take(&mut train(with_bad(), workers, 0), 40), expected, "{workers} workers");
        }
    }

    #[test]
    fn a_later_start_continues_exactly() {
        let expected = take(&mut train(with_bad(), 2, 0), 40);
        for first in [1, 8, 29] {
            let resumed = take(&mut train(with_bad(), 3, first as u64), 40 - first);
            assert_eq!(resumed, expected[first..]);
        }
    }

    #[test]
    fn a_batch_holds_what_its_indices_say() {
        let dataset = Plain::new(30);
        let stream = EpochStream::over_all(30, seeded(7)).expect("not empty");
        for (step, batch) in (0..).zip(take(&mut train(Plain::new(30), 2, 0), 30)) {
            assert_eq!((batch.step, batch.valid), (step, 4));
            for slot in 0..4 {
                let index = batch.indices[slot] as usize;
                assert_eq!(index, stream.index(step * 4 + slot as u64));
                assert_eq!(Some(batch.labels[slot]), dataset.label(index));
                assert_eq!(batch.images[slot * 12..][..12], [index as u8; 12]);
            }
        }
    }

    #[test]
    fn draws_cover_their_range() {
        let draws: Vec<Draw> = take(&mut train(Plain::new(30), 1, 0), 500).into_iter().flat_map(|b| b.draws).collect();
        for shift in -4..=4 {
            for count in [
                draws.iter().filter(|draw| draw.dy == shift).count(),
                draws.iter().filter(|draw| draw.dx == shift).count(),
            ] {
                // 2,000 draws of probability 1/9: 222, standard deviation 14.
                assert!((152..292).contains(&count), "{shift}: {count}");
            }
        }
        assert!(draws.iter().all(|draw| draw.dy.abs() <= 4 && draw.dx.abs() <= 4));
        let flips = draws.iter().filter(|draw| draw.flip).count();
        assert!((888..1112).contains(&flips), "{flips}");
        // Rows, columns and flips are drawn independently: all 162 combinations occur.
        let kinds: HashSet<_> = draws.iter().map(|draw| (draw.dy, draw.dx, draw.flip)).collect();
        assert_eq!(kinds.len(), 162);
    }

    #[test]
    fn bad_images_are_replaced_and_listed_once() {
        let mut loader = train(with_bad(), 2, 0);
        let batches = take(&mut loader, 40);
        assert!(batches.iter().all(|batch| batch.valid == 4));
        assert!(batches.iter().flat_map(|batch| &batch.indices).all(|&index| index != 3 && index != 12));
        let mut bad: Vec<_> = loader.bad_files().iter().map(ToString::to_string).collect();
        bad.sort();
        assert_eq!(bad, ["folder/12.png\ttorn", "folder/3.png\ttorn"]);
    }

    #[test]
    fn too_many_bad_images_are_an_error() {
        for workers in [0, 2] {
            let dataset = Plain { bad: vec![1, 3, 5, 7], ..Plain::new(30) };
            let mut loader = train(dataset, workers, 0);
            let error = (0..20).find_map(|_| loader.next_batch().err()).expect("4 of 30 is more than a tenth");
            assert!(matches!(error, Error::TooManyBad { bad: 4, total: 30, .. }), "{error:?}");
            assert!(loader.next_batch().is_err());
        }
    }

    #[test]
    fn no_good_image_at_all_is_an_error_even_if_allowed() {
        let dataset = Plain { bad: (0..5).collect(), ..Plain::new(5) };
        let stream = EpochStream::over_all(5, seeded(0)).expect("not empty");
        let config = LoaderConfig { max_bad: 1.0, ..config(1) };
        let mut loader =
            TrainLoader::new(Arc::new(dataset), Arc::new(stream), seeded(0), Augment::Eval, config, 0).expect("good");
        assert!(matches!(loader.next_batch(), Err(Error::TooManyBad { bad: 5, .. })));
    }

    #[test]
    fn a_panic_in_a_thread_is_an_error() {
        for workers in [1, 3] {
            let mut loader = train(Plain { panics_at: Some(11), ..Plain::new(30) }, workers, 0);
            let error = (0..20).find_map(|_| loader.next_batch().err()).expect("an epoch is 8 batches");
            assert!(matches!(&error, Error::Worker { message } if message.contains("poisonous")), "{error:?}");
            assert!(loader.next_batch().is_err());
        }
    }

    #[test]
    fn dropping_the_loader_ends_its_threads() {
        let dataset: Arc<dyn Dataset> = Arc::new(Plain::new(30));
        let stream = Arc::new(EpochStream::over_all(30, seeded(0)).expect("not empty"));
        for taken in [0, 1, 5] {
            let mut loader = TrainLoader::new(dataset.clone(), stream.clone(), seeded(0), Augment::Train, config(3), 0)
                .expect("good");
            take(&mut loader, taken);
            drop(loader);
            // Every thread held a reference.
            assert_eq!(Arc::strong_count(&dataset), 1);
        }
    }

    #[test]
    fn buffers_come_back() {
        let mut loader = train(Plain::new(30), 0, 0);
        let batch = loader.next_batch().expect("no bad images");
        let address = batch.images.as_ptr();
        loader.recycle(batch);
        assert_eq!(loader.next_batch().expect("no bad images").images.as_ptr(), address);
    }

    fn evaluate(dataset: Plain, items: Vec<usize>, workers: usize) -> (Vec<Batch>, usize) {
        let mut loader =
            EvalLoader::new(Arc::new(dataset), items, seeded(0), config(workers)).expect("a good configuration");
        let mut batches = Vec::new();
        while let Some(batch) = loader.next_batch().expect("few bad images") {
            batches.push(batch.clone());
            loader.recycle(batch);
        }
        let bad = loader.bad_files().len();
        (batches, bad)
    }

    #[test]
    fn evaluation_walks_once_and_pads() {
        for workers in [0, 1, 3, 9] {
            let (batches, _) = evaluate(Plain::new(30), (0..10).collect(), workers);
            assert_eq!(batches.iter().map(|batch| batch.valid).collect::<Vec<_>>(), [4, 4, 2]);
            assert_eq!(batches[2].indices, [8, 9, u64::MAX, u64::MAX]);
            assert_eq!(batches[2].labels, [0, 1, UNLABELLED, UNLABELLED]);
            assert_eq!(batches[2].images[..24], [[8; 12], [9; 12]].concat());
            assert_eq!(batches[2].images[24..], [0; 24]);
            assert!(batches.iter().flat_map(|batch| &batch.draws).all(|draw| *draw == Draw::default()));
        }
        assert!(evaluate(Plain::new(30), Vec::new(), 2).0.is_empty());
    }

    #[test]
    fn evaluation_leaves_bad_images_out() {
        for workers in [0, 2] {
            let (batches, bad) = evaluate(with_bad(), (0..10).collect(), workers);
            assert_eq!(bad, 1);
            assert_eq!(batches[0].indices, [0, 1, 2, u64::MAX]);
            assert_eq!(batches[0].valid, 3);
            assert_eq!(batches[1].indices, [4, 5, 6, 7]);
        }
    }

    /// In training by the sample's number, whatever image stands in for a bad one; in evaluation by the image, padding included.
    #[test]
    fn every_image_has_its_order() {
        let of = |numbers: &[u64]| numbers.iter().flat_map(|&n| [n as u32, (n >> 32) as u32]).collect::<Vec<_>>();
        for workers in [0, 2] {
            let batches = take(&mut train(with_bad(), workers, 2), 10);
            for (batch, step) in batches.iter().zip(2..) {
                assert_eq!(batch.orders, of(&(4 * step..4 * step + 4).collect::<Vec<_>>()));
            }
            for batch in evaluate(with_bad(), (3..10).collect(), workers).0 {
                assert_eq!(batch.orders, of(&batch.indices));
            }
        }
    }

    #[test]
    fn impossible_configurations_are_refused() {
        for config in [
            LoaderConfig { batch: 0, ..config(1) },
            LoaderConfig { size: 0, ..config(1) },
            LoaderConfig { max_bad: 1.5, ..config(1) },
            LoaderConfig { max_bad: f64::NAN, ..config(1) },
        ] {
            let made = EvalLoader::new(Arc::new(Plain::new(3)), vec![0], seeded(0), config);
            assert!(matches!(made.err(), Some(Error::Usage { .. })), "{config:?}");
        }
    }

    /// 4 of 40 are allowed: with 4 that were met before, the fifth is one too many, and one of the 4 is not.
    #[test]
    fn bad_images_of_earlier_are_counted() {
        let known = |index: usize| BadFile { index, key: Plain::new(40).key(index), reason: "broken".into() };
        for (bad, fails) in [(5, true), (3, false)] {
            let mut loader = train(Plain { bad: vec![bad], ..Plain::new(40) }, 2, 0);
            loader.recall_bad((0..4).map(known));
            let error = (0..20).find_map(|_| loader.next_batch().err());
            assert_eq!(matches!(error, Some(Error::TooManyBad { bad: 5, .. })), fails, "{error:?}");
            assert_eq!(loader.bad_files().len(), if fails { 5 } else { 4 });
        }
    }

    /// Not a matter of so many bad images: nothing is skipped in their place.
    #[test]
    fn data_that_went_away_end_the_loader() {
        for workers in [0, 2] {
            let mut loader = train(Plain { bad: vec![3], gone: true, ..Plain::new(40) }, workers, 0);
            let error = (0..20).find_map(|_| loader.next_batch().err()).expect("image 3 comes in two epochs");
            assert!(matches!(error, Error::Read { .. }), "{workers}: {error}");
            assert!(loader.bad_files().is_empty() && loader.next_batch().is_err());
            let data = Arc::new(Plain { bad: vec![1], gone: true, ..Plain::new(4) });
            let mut loader =
                EvalLoader::new(data, (0..4).collect(), seeded(0), config(workers)).expect("a good configuration");
            assert!(loader.next_batch().is_err());
        }
    }
}
