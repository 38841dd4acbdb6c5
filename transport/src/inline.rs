//! Tasks of the runtime that a protocol thread may poll itself.
//!
//! Posting a small frame wakes two tasks, one after the other: the stream's writer and QUIC's
//! driver of the connection. On the runtime's thread that costs a switch of threads before the
//! datagram leaves. Inside [`inline`] the wakes of this thread are collected instead, and what was
//! woken is polled here, each task once. A task that another thread polls at that moment, or that
//! has more to do, goes on where it always runs: on the runtime.

use crate::socket::FewAtOnce;
use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime};
use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, TryLockError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

/// A task that this crate may poll from two places.
struct Task {
    /// Locked while it is polled; `None` once it has ended or its runtime has.
    future: Mutex<Option<Pin<Box<dyn Future<Output = ()> + Send>>>>,
    /// Wakes the task on its runtime. Set before `future` is polled for the first time.
    home: OnceLock<Waker>,
    runtime: Handle,
}

impl Task {
    fn poll(
        self: &Arc<Self>,
        future: &mut Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    ) -> Poll<()> {
        let waker = Waker::from(self.clone());
        let Some(running) = future else {
            return Poll::Ready(());
        };
        let polled = running.as_mut().poll(&mut Context::from_waker(&waker));
        if polled.is_ready() {
            *future = None;
        }
        polled
    }

    /// Polls here, if nobody polls it now; whatever is left to do, its runtime does.
    fn poll_inline(self: &Arc<Self>) {
        let ended = match self.future.try_lock() {
            Ok(mut future) => {
                // Timers that it makes belong to its runtime.
                let _inside = self.runtime.enter();
                self.poll(&mut future).is_ready()
            }
            Err(TryLockError::WouldBlock | TryLockError::Poisoned(_)) => true,
        };
        if ended {
            self.wake_home();
        }
    }

    fn wake_home(&self) {
        if let Some(home) = self.home.get() {
            home.wake_by_ref();
        }
    }
}

impl Wake for Task {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Without the thread's storage the thread is ending: it polls nothing any more.
        let collected = WOKEN.try_with(|woken| match woken.borrow_mut().as_mut() {
            Some(woken) => woken.add(self),
            None => false,
        });
        if !collected.unwrap_or(false) {
            self.wake_home();
        }
    }
}

thread_local! {
    /// What this thread has woken inside [`inline`].
    static WOKEN: RefCell<Option<Woken>> = const { RefCell::new(None) };
}

#[derive(Default)]
struct Woken {
    tasks: Vec<Arc<Task>>,
    /// So many of them have been polled or are being polled.
    begun: usize,
}

impl Woken {
    /// Whether this thread will still poll the task.
    fn add(&mut self, task: &Arc<Task>) -> bool {
        match self.tasks.iter().position(|known| Arc::ptr_eq(known, task)) {
            Some(at) => at >= self.begun,
            None => {
                self.tasks.push(task.clone());
                true
            }
        }
    }

    fn next(&mut self) -> Option<Arc<Task>> {
        let task = self.tasks.get(self.begun).cloned()?;
        self.begun += 1;
        Some(task)
    }
}

/// Ends the collecting also where `work` or a task panics: then the runtime finds that out.
struct Collecting;

impl Drop for Collecting {
    fn drop(&mut self) {
        let left = WOKEN.with(|woken| woken.borrow_mut().take());
        for task in left.iter().flat_map(|woken| &woken.tasks) {
            if std::thread::panicking() {
                task.wake_home();
            }
        }
    }
}

/// Does `work`, which must not wait for what it wakes, and then polls here, once each, the tasks
/// that it woke and those that these wake.
pub(crate) fn inline<T>(work: impl FnOnce() -> T) -> T {
    WOKEN.with(|woken| *woken.borrow_mut() = Some(Woken::default()));
    let collecting = Collecting;
    let result = work();
    let next = || WOKEN.with(|woken| woken.borrow_mut().as_mut().and_then(Woken::next));
    while let Some(task) = next() {
        task.poll_inline();
    }
    drop(collecting);
    result
}

/// The task's place on its runtime. Dropping it drops the future, as the runtime's end does.
struct Home(Arc<Task>);

impl Future for Home {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // One task keeps one waker for all its life.
        self.0.home.get_or_init(|| cx.waker().clone());
        // Waits at most for the few datagrams that a protocol thread sends at once.
        match self.0.future.lock() {
            Ok(mut future) => self.0.poll(&mut future),
            // It panicked on a protocol thread.
            Err(_) => Poll::Ready(()),
        }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // After this no thread polls it: its runtime's timers may go.
        let future = self
            .0
            .future
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        drop(future);
    }
}

/// Spawns a task that threads inside [`inline`] may poll.
pub(crate) fn spawn(
    runtime: &Handle,
    future: impl Future<Output = ()> + Send + 'static,
) -> JoinHandle<()> {
    spawn_boxed(runtime, Box::pin(future))
}

fn spawn_boxed(
    runtime: &Handle,
    future: Pin<Box<dyn Future<Output = ()> + Send>>,
) -> JoinHandle<()> {
    runtime.spawn(Home(Arc::new(Task {
        future: Mutex::new(Some(future)),
        home: OnceLock::new(),
        runtime: runtime.clone(),
    })))
}

/// Tokio for QUIC, with drivers that [`inline`] may poll.
#[derive(Debug)]
pub(crate) struct InlineRuntime(pub(crate) Handle);

impl Runtime for InlineRuntime {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        drop(spawn_boxed(&self.0, future));
    }

    fn wrap_udp_socket(&self, socket: std::net::UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        Ok(Arc::new(FewAtOnce(TokioRuntime.wrap_udp_socket(socket)?)))
    }

    fn now(&self) -> Instant {
        TokioRuntime.now()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{self, Receiver, Sender};
    use std::thread::ThreadId;
    use std::time::Duration;
    use tokio::sync::Notify;

    const LONG: Duration = Duration::from_secs(20);
    const SHORT: Duration = Duration::from_millis(50);

    /// A runtime on a thread of its own; ends when the sender is dropped.
    fn runtime() -> (
        Handle,
        tokio::sync::oneshot::Sender<()>,
        std::thread::JoinHandle<()>,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let handle = runtime.handle().clone();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let thread = std::thread::spawn(move || drop(runtime.block_on(stopped)));
        (handle, stop, thread)
    }

    /// A task that says where it runs whenever it is notified, and then notifies `then`.
    fn teller(runtime: &Handle, then: Option<Arc<Notify>>) -> (Arc<Notify>, Receiver<ThreadId>) {
        let (notify, (tell, told)) = (Arc::new(Notify::new()), mpsc::channel());
        let on = notify.clone();
        spawn(runtime, async move {
            loop {
                on.notified().await;
                if tell.send(std::thread::current().id()).is_err() {
                    return;
                }
                if let Some(then) = &then {
                    then.notify_one();
                }
            }
        });
        // Until it has been polled on its runtime nobody else polls it.
        notify.notify_one();
        told.recv_timeout(LONG).unwrap();
        (notify, told)
    }

    #[test]
    fn what_is_woken_and_what_that_wakes_runs_here_before_the_return() {
        let (runtime, _stop, _thread) = runtime();
        let (second, told_second) = teller(&runtime, None);
        let (first, told_first) = teller(&runtime, Some(second));
        told_second.recv_timeout(LONG).unwrap();
        // Both are waiting again once the runtime has nothing more to do.
        std::thread::sleep(SHORT);
        inline(|| first.notify_one());
        let here = std::thread::current().id();
        assert_eq!(told_first.try_recv(), Ok(here));
        assert_eq!(told_second.try_recv(), Ok(here));
        first.notify_one();
        assert_ne!(told_first.recv_timeout(LONG).unwrap(), here);
    }

    #[test]
    fn a_task_with_more_to_do_goes_on_on_its_runtime() {
        let (runtime, _stop, _thread) = runtime();
        let (notify, (tell, told)) = (Arc::new(Notify::new()), mpsc::channel());
        let on = notify.clone();
        spawn(&runtime, async move {
            loop {
                on.notified().await;
                for _ in 0..2 {
                    if tell.send(std::thread::current().id()).is_err() {
                        return;
                    }
                    tokio::task::yield_now().await;
                }
            }
        });
        std::thread::sleep(SHORT);
        inline(|| notify.notify_one());
        let here = std::thread::current().id();
        assert_eq!(told.recv_timeout(LONG).unwrap(), here);
        assert_ne!(told.recv_timeout(LONG).unwrap(), here);
    }

    #[test]
    fn a_task_that_is_being_polled_is_not_waited_for_and_misses_nothing() {
        let (runtime, _stop, _thread) = runtime();
        let (notify, (tell, told)) = (Arc::new(Notify::new()), mpsc::channel());
        let (go, gone): (Sender<()>, Receiver<()>) = mpsc::channel();
        let on = notify.clone();
        spawn(&runtime, async move {
            let mut notified = std::pin::pin!(on.notified());
            let mut held = false;
            let waiting = tell.clone();
            std::future::poll_fn(move |cx| {
                let polled = notified.as_mut().poll(cx);
                if !std::mem::replace(&mut held, true) {
                    // Waits already, and is still being polled until `go`.
                    waiting.send(0).unwrap();
                    gone.recv_timeout(LONG).unwrap();
                }
                polled
            })
            .await;
            tell.send(1).unwrap();
        });
        assert_eq!(told.recv_timeout(LONG), Ok(0));
        inline(|| notify.notify_one());
        assert!(told.try_recv().is_err());
        go.send(()).unwrap();
        assert_eq!(told.recv_timeout(LONG), Ok(1));
    }

    #[test]
    fn the_end_of_the_runtime_drops_the_task_and_later_wakes_do_nothing() {
        let (runtime, stop, thread) = runtime();
        let (notify, told) = teller(&runtime, None);
        drop(stop);
        thread.join().unwrap();
        inline(|| notify.notify_one());
        assert_eq!(told.try_recv(), Err(mpsc::TryRecvError::Disconnected));
    }

    #[test]
    fn a_task_that_panics_here_is_dropped_and_this_thread_polls_on() {
        let (runtime, _stop, _thread) = runtime();
        let (notify, (tell, told)) = (Arc::new(Notify::new()), mpsc::channel::<()>());
        let on = notify.clone();
        spawn(&runtime, async move {
            let _tell = tell;
            on.notified().await;
            panic!("on purpose");
        });
        std::thread::sleep(SHORT);
        let unwound = std::panic::catch_unwind(|| inline(|| notify.notify_one()));
        assert!(unwound.is_err());
        assert_eq!(
            told.recv_timeout(LONG),
            Err(mpsc::RecvTimeoutError::Disconnected)
        );
        let (other, told) = teller(&runtime, None);
        std::thread::sleep(SHORT);
        inline(|| other.notify_one());
        assert_eq!(told.try_recv(), Ok(std::thread::current().id()));
    }
}
