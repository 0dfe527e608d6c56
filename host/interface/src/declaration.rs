//! The declaration of an interface.

/// A data queue in which a client puts entries and the driver takes them: its place in the
/// interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ToDriver(pub usize);

/// A data queue in which the driver puts entries and a client takes them: its place in the
/// interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ToClient(pub usize);

/// Declares what a driver offers: numbered methods, then numbered data queues.
///
/// ```
/// iohost_interface::interface! {
///     /// Adds and streams.
///     pub interface adder;
///
///     methods {
///         /// The sum, modulo 2^32.
///         0 => fn add(a: u32, b: u32) -> u32 [idempotent];
///     }
///
///     queues {
///         /// Entries for the device.
///         0 => UPLOAD: ToDriver;
///     }
/// }
/// # use iohost_interface::{Description, Reply};
/// struct Driver;
/// impl Server for Driver {
///     fn add(&mut self, a: u32, b: u32, reply: Reply<u32>) {
///         reply.complete(a.wrapping_add(b));
///     }
/// }
/// let description = Description::parse(&description()).unwrap();
/// assert_eq!(description.methods[0].name, "add");
/// assert_eq!(UPLOAD.0, 0);
/// ```
///
/// It makes, in the current module: `trait Server` for the driver, with the arguments and a
/// [`Reply`](crate::Reply) for each method; `struct Client` for clients, whose methods return an
/// [`Answer`](crate::Answer); `serve`, which decodes a call and hands it to a `Server`;
/// `description()`; and a constant per queue.
///
/// `[idempotent]` behind a method is the driver's promise that doing it twice is as good as doing it
/// once. A call of such a method whose driver dies is made again to the next one; of any other
/// method the caller is told `NO_COMPLETION`, if it was begun.
///
/// A number, once published, keeps its meaning: new methods and queues get new numbers.
#[macro_export]
macro_rules! interface {
    (
        $(#[$about:meta])*
        pub interface $interface:ident;

        methods {
            $($(#[$method_doc:meta])*
            $selector:literal =>
                fn $method:ident($($argument:ident: $argument_type:ty),* $(,)?) $(-> $result:ty)?
                $([$promise:ident])?;)*
        }

        queues {
            $($(#[$queue_doc:meta])*
            $place:literal => $queue:ident: $direction:ident;)*
        }
    ) => {
        /// What the driver implements. Every method runs on the driver's default queue.
        $(#[$about])*
        pub trait Server: Send + 'static {
            $(
                $(#[$method_doc])*
                fn $method(
                    &mut self,
                    $($argument: $argument_type,)*
                    reply: $crate::Reply<$crate::interface!(@result $($result)?)>,
                );
            )*
        }

        /// What a client calls. Every method sends the call and returns at once.
        $(#[$about])*
        #[derive(Clone)]
        pub struct Client {
            caller: ::std::sync::Arc<dyn $crate::Caller>,
        }

        impl $crate::InterfaceClient for Client {
            const NAME: &'static str = stringify!($interface);

            fn description() -> ::std::string::String {
                description()
            }

            fn new(caller: ::std::sync::Arc<dyn $crate::Caller>) -> Self {
                Self { caller }
            }
        }

        impl ::std::fmt::Debug for Client {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                f.write_str(concat!(stringify!($interface), "::Client"))
            }
        }

        impl Client {
            $(
                $(#[$method_doc])*
                pub fn $method(
                    &self,
                    $($argument: $argument_type),*
                ) -> $crate::Answer<$crate::interface!(@result $($result)?)> {
                    #[allow(unused_mut, reason = "a method without arguments")]
                    let mut arguments = $crate::Arguments::default();
                    $($crate::Argument::put($argument, &mut arguments);)*
                    $crate::Answer::new(self.caller.call($selector, arguments))
                }
            )*
        }

        $($(#[$queue_doc])* pub const $queue: $crate::$direction = $crate::$direction($place);)*

        /// Decodes a call and hands it to `server`. An unknown selector is answered
        /// `BAD_MESSAGE_ID`, arguments that do not fit `BAD_ARGUMENT`.
        pub fn serve(
            server: &mut impl Server,
            selector: u64,
            arguments: $crate::Arguments,
            sink: ::std::boxed::Box<dyn $crate::ReplySink>,
        ) {
            match selector {
                $($selector => {
                    match <($($argument_type,)*) as $crate::Results>::from_arguments(arguments) {
                        Ok(($($argument,)*)) => {
                            server.$method($($argument,)* $crate::Reply::new(sink));
                        }
                        Err(status) => sink.deliver(Err(status)),
                    }
                })*
                _ => {
                    let _ = (server, arguments);
                    sink.deliver(Err($crate::IOReturn::BAD_MESSAGE_ID));
                }
            }
        }

        /// The interface in the text form of [`Description`]($crate::Description).
        pub fn description() -> ::std::string::String {
            let methods = ::std::vec![$($crate::Method {
                selector: $selector,
                name: stringify!($method).to_owned(),
                arguments: <($($argument_type,)*) as $crate::Results>::types()
                    .into_iter().map(str::to_owned).collect(),
                results: <$crate::interface!(@result $($result)?) as $crate::Results>::types()
                    .into_iter().map(str::to_owned).collect(),
                is_idempotent: $crate::interface!(@is_idempotent $($promise)?),
            }),*];
            let queues = ::std::vec![$($crate::Queue {
                place: $place,
                name: stringify!($queue).to_lowercase(),
                direction: $crate::Direction::$direction,
            }),*];
            let name = stringify!($interface).to_owned();
            $crate::Description { name, methods, queues }.to_string()
        }
    };
    (@is_idempotent) => { false };
    (@is_idempotent idempotent) => { true };
    (@result) => { () };
    (@result $result:ty) => { $result };
}
