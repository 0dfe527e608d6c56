//! An interface as text, for programs that learn it at run time.
//!
//! ```text
//! interface edu
//! method 0 factorial(u32) -> (u32) idempotent
//! queue 0 upload ToDriver
//! ```

use std::fmt;
use std::str::FromStr;

/// What a driver offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// The interface's name.
    pub name: String,
    /// Its methods.
    pub methods: Vec<Method>,
    /// The data queues of each session, by place.
    pub queues: Vec<Queue>,
}

/// A method. Types are spelled as [`Argument::TYPE`](crate::Argument::TYPE) does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Method {
    /// The number that travels.
    pub selector: u64,
    /// The name for people.
    pub name: String,
    /// Types of the arguments, in order.
    pub arguments: Vec<String>,
    /// Types of the results, in order.
    pub results: Vec<String>,
    /// Doing it twice is as good as doing it once, so that a call whose driver died in the middle
    /// is made again.
    pub is_idempotent: bool,
}

/// A data queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Queue {
    /// Its place in every session.
    pub place: usize,
    /// The name for people.
    pub name: String,
    /// Who puts entries in.
    pub direction: Direction,
}

/// Who takes the entries of a data queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The driver takes what a client puts.
    ToDriver,
    /// A client takes what the driver puts.
    ToClient,
}

impl Direction {
    /// The bell that the client rings, and the one that it hears, of a queue's data-available and
    /// data-serviced ones.
    pub fn bells<Bell>(self, available: Bell, serviced: Bell) -> (Bell, Bell) {
        match self {
            Self::ToDriver => (available, serviced),
            Self::ToClient => (serviced, available),
        }
    }
}

/// A line that is not part of a description.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a line of an interface description: {line:?}")]
pub struct DescriptionError {
    /// The line.
    pub line: String,
}

impl Description {
    /// Reads the text form.
    pub fn parse(text: &str) -> Result<Self, DescriptionError> {
        let mut description = Self { name: String::new(), methods: Vec::new(), queues: Vec::new() };
        for line in text.lines() {
            let parsed = description.parse_line(line);
            parsed.ok_or_else(|| DescriptionError { line: line.to_owned() })?;
        }
        Ok(description)
    }

    /// Whether whoever was built against `wanted` can use this: its methods and queues are all
    /// here, with the same numbers, types and directions. Names and what comes on top do not
    /// matter. The error is the first line that is missing, as the text form has it.
    pub fn offers(&self, wanted: &Description) -> Result<(), String> {
        if self.name != wanted.name {
            return Err(format!("interface {}", wanted.name));
        }
        for method in &wanted.methods {
            let same = |other: &&Method| {
                other.selector == method.selector
                    && other.arguments == method.arguments
                    && other.results == method.results
            };
            if self.methods.iter().find(same).is_none() {
                return Err(format!("method {} {method}", method.selector));
            }
        }
        for queue in &wanted.queues {
            let other = self.queues.get(queue.place);
            if other.is_none_or(|other| other.direction != queue.direction) {
                return Err(queue.to_string());
            }
        }
        Ok(())
    }

    /// Whether sessions of a driver that served `earlier` can go on with this: it [`offers`] as
    /// much, and what could be done twice still can.
    ///
    /// [`offers`]: Self::offers
    pub fn continues(&self, earlier: &Description) -> bool {
        let is_idempotent = |method: &Method| {
            self.methods.iter().any(|own| own.selector == method.selector && own.is_idempotent)
        };
        self.offers(earlier).is_ok()
            && self.queues.len() == earlier.queues.len()
            && earlier.methods.iter().all(|method| !method.is_idempotent || is_idempotent(method))
    }

    /// The method of that name.
    pub fn method(&self, name: &str) -> Option<&Method> {
        self.methods.iter().find(|method| method.name == name)
    }

    fn parse_line(&mut self, line: &str) -> Option<()> {
        let (kind, rest) = line.split_once(' ')?;
        match kind {
            "interface" => self.name = rest.to_owned(),
            "method" => {
                let (selector, rest) = rest.split_once(' ')?;
                let (rest, is_idempotent) = match rest.strip_suffix(IDEMPOTENT) {
                    Some(rest) => (rest, true),
                    None => (rest, false),
                };
                let (signature, results) = rest.split_once(" -> ")?;
                let (name, arguments) = signature.split_once('(')?;
                self.methods.push(Method {
                    selector: selector.parse().ok()?,
                    name: name.to_owned(),
                    arguments: types(arguments.strip_suffix(')')?),
                    results: types(results.strip_prefix('(')?.strip_suffix(')')?),
                    is_idempotent,
                });
            }
            "queue" => {
                let mut words = rest.split(' ');
                self.queues.push(Queue {
                    place: words.next()?.parse().ok()?,
                    name: words.next()?.to_owned(),
                    direction: words.next()?.parse().ok()?,
                });
                // A place names a queue only if places are the numbers from 0.
                if self.queues.last()?.place != self.queues.len() - 1 {
                    return None;
                }
            }
            _ => return None,
        }
        Some(())
    }
}

/// What ends the line of a method that is.
const IDEMPOTENT: &str = " idempotent";

fn types(list: &str) -> Vec<String> {
    list.split(", ").filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

impl FromStr for Direction {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "ToDriver" => Ok(Direction::ToDriver),
            "ToClient" => Ok(Direction::ToClient),
            _ => Err(()),
        }
    }
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "interface {}", self.name)?;
        for method in &self.methods {
            writeln!(f, "method {} {method}", method.selector)?;
        }
        for queue in &self.queues {
            writeln!(f, "{queue}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "queue {} {} {:?}", self.place, self.name, self.direction)
    }
}

/// `name(arguments) -> (results)`, for people too.
impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (arguments, results) = (self.arguments.join(", "), self.results.join(", "));
        write!(f, "{}({arguments}) -> ({results})", self.name)?;
        f.write_str(if self.is_idempotent { IDEMPOTENT } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_form_reads_back_as_it_was() {
        let text = "interface edu\nmethod 0 factorial(u32) -> (u32)\nmethod 1 reset() -> () idempotent\n\
                    queue 0 upload ToDriver\nqueue 1 download ToClient\n";
        let description = Description::parse(text).unwrap();
        assert_eq!(description.to_string(), text);
        assert_eq!(description.method("factorial").unwrap().arguments, ["u32"]);
        assert!(!description.method("factorial").unwrap().is_idempotent);
        assert!(description.method("reset").unwrap().is_idempotent);
    }

    #[test]
    fn sessions_go_on_with_an_interface_that_keeps_every_promise() {
        let parse = |text: &str| Description::parse(text).unwrap();
        let earlier = parse("interface a\nmethod 0 f() -> () idempotent\nqueue 0 up ToDriver\n");
        let grown = "interface a\nmethod 0 f() -> () idempotent\nmethod 1 g() -> ()\n\
                     queue 0 up ToDriver\n";
        assert!(parse(grown).continues(&earlier));
        assert!(!parse(&grown.replace(" idempotent", "")).continues(&earlier));
        assert!(!parse(&grown.replace("method 0", "method 2")).continues(&earlier));
        let one_more = format!("{grown}queue 1 down ToClient\n");
        assert!(!parse(&one_more).continues(&earlier), "sessions have no such queue");
    }

    #[test]
    fn an_interface_that_grew_serves_older_clients_and_one_that_changed_does_not() {
        let parse = |text: &str| Description::parse(text).unwrap();
        let wanted = parse("interface edu\nmethod 0 f(u32) -> (u32)\nqueue 0 up ToDriver\n");
        let grown = "interface edu\nmethod 0 renamed(u32) -> (u32)\nmethod 1 g() -> ()\n\
                     queue 0 up ToDriver\nqueue 1 down ToClient\n";
        assert_eq!(parse(grown).offers(&wanted), Ok(()));

        let changed = [
            ("edu\n", "other\n", "interface edu"),
            ("method 0", "method 2", "method 0 f(u32) -> (u32)"),
            ("(u32) -> (u32)", "(u64) -> (u32)", "method 0 f(u32) -> (u32)"),
            ("(u32) -> (u32)", "(u32) -> ()", "method 0 f(u32) -> (u32)"),
            ("up ToDriver", "up ToClient", "queue 0 up ToDriver"),
        ];
        for (from, to, missing) in changed {
            let found = parse(&grown.replacen(from, to, 1));
            assert_eq!(found.offers(&wanted), Err(missing.to_owned()), "{from} to {to}");
        }
        let smaller = parse("interface edu\nmethod 0 f(u32) -> (u32)\n");
        assert_eq!(smaller.offers(&wanted), Err("queue 0 up ToDriver".to_owned()));
    }

    #[test]
    fn a_line_that_makes_no_sense_is_named() {
        for line in ["nonsense", "method x f() -> ()", "queue 1 gap ToDriver"] {
            assert_eq!(Description::parse(line).unwrap_err().line, line);
        }
    }
}
