//! Which clients may do what, and how much of it.
//!
//! Whoever may write to the control socket may connect: the daemon's user, its group, and root.
//! What a client is comes from the kernel, which noted it when it connected (`Peer`). Opening a
//! service can be restricted further, device by device; taking and giving back devices is root's
//! and the daemon's own user's, unless the configuration says who else. A client is a process for
//! what is counted here, so that one that floods us leaves the others of its user alone; how many
//! connections a user has is limited too, or many processes would be a way around.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use iohost_control::host::Failure;
use iohost_event::Peer;
use log::warn;
use nix::unistd::Uid;

use crate::config::Limits;

/// Users and groups, by number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Users.
    pub users: Vec<u32>,
    /// Groups: a client's own one, and its other ones.
    pub groups: Vec<u32>,
}

impl Allowed {
    /// Whether a client is one of them, or root, or of the daemon's user.
    pub fn allows(&self, client: &Peer) -> bool {
        client.uid == 0
            || client.uid == Uid::effective().as_raw()
            || self.users.contains(&client.uid)
            || client.gids.iter().any(|gid| self.groups.contains(gid))
    }

    /// A client may open this service, or is told why not.
    pub(crate) fn check_open(&self, client: &Peer, service: &str) -> Result<(), Failure> {
        if self.allows(client) {
            return Ok(());
        }
        let Peer { pid, uid, gids } = client;
        warn!(service, uid, pid; "a client was refused: it may not open the service");
        Err(Failure::new(
            "access-denied",
            format!("user {uid} with groups {gids:?} may not open service {service:?}"),
            "have the user or one of its groups added to `allow_users` or `allow_groups` of the \
             device in the configuration",
        ))
    }

    /// A client may change what the daemon has, or is told why not.
    pub(crate) fn check_admin(&self, client: &Peer, method: &str) -> Result<(), Failure> {
        if self.allows(client) {
            return Ok(());
        }
        let Peer { pid, uid, gids } = client;
        warn!(method, uid, pid; "a client was refused: the method is for administrators");
        Err(Failure::new(
            "admin-only",
            format!("user {uid} with groups {gids:?} may not call {method}"),
            "run it as root, or have the user or one of its groups added to `admin_users` or \
             `admin_groups` in the configuration",
        ))
    }
}

/// The clients that are connected, by process.
#[derive(Debug)]
pub(crate) struct Clients {
    limits: Limits,
    /// All connections, and those of each user.
    connections: Cell<usize>,
    users: RefCell<HashMap<u32, usize>>,
    clients: RefCell<HashMap<(u32, u32), Weak<Client>>>,
}

/// Connections of all clients at the same time.
const MOST_CONNECTIONS: usize = 128;

/// Of these a single user may have.
const MOST_OF_ONE_USER: usize = MOST_CONNECTIONS * 3 / 4;

/// How often one client's refusals are logged.
const LOG_AGAIN: Duration = Duration::from_secs(1);

/// One process that is connected, by any number of connections.
#[derive(Debug)]
struct Client {
    peer: Peer,
    connections: Cell<usize>,
    /// Requests it may make at once, and when that was so.
    credit: Cell<(f64, Instant)>,
    logged: Cell<Option<Instant>>,
}

/// One connection, which counts while it lives.
#[derive(Debug)]
pub(crate) struct Connection {
    client: Rc<Client>,
    clients: Rc<Clients>,
}

impl Clients {
    pub(crate) fn new(limits: Limits) -> Rc<Self> {
        Rc::new(Self {
            limits,
            connections: Cell::new(0),
            users: RefCell::default(),
            clients: RefCell::default(),
        })
    }

    /// Counts one more connection of a client, or says why there may not be one.
    pub(crate) fn connect(self: &Rc<Self>, peer: Peer) -> Result<Connection, Failure> {
        let key = (peer.uid, peer.pid);
        let mut clients = self.clients.borrow_mut();
        let known = clients.get(&key).and_then(Weak::upgrade);
        let client = known.unwrap_or_else(|| {
            let client = Rc::new(Client {
                peer,
                connections: Cell::new(0),
                credit: Cell::new((f64::from(self.limits.requests_per_second), Instant::now())),
                logged: Cell::new(None),
            });
            clients.insert(key, Rc::downgrade(&client));
            client
        });
        let of_user = self.users.borrow().get(&client.peer.uid).copied().unwrap_or(0);
        let most = self.limits.connections_per_client;
        let refusal = if client.connections.get() >= most {
            Some(format!("process {} has {most} connections already", client.peer.pid))
        } else if of_user >= MOST_OF_ONE_USER {
            Some(format!("user {} has {of_user} connections already", client.peer.uid))
        } else if self.connections.get() >= MOST_CONNECTIONS {
            Some(format!("there are {MOST_CONNECTIONS} connections already"))
        } else {
            None
        };
        if let Some(message) = refusal {
            client.log("it has too many connections");
            return Err(Failure::new(
                "too-many-connections",
                message,
                "close some, or raise `connections_per_client` in the configuration",
            ));
        }
        self.connections.set(self.connections.get() + 1);
        *self.users.borrow_mut().entry(client.peer.uid).or_default() += 1;
        client.connections.set(client.connections.get() + 1);
        Ok(Connection { client, clients: self.clone() })
    }
}

impl Connection {
    pub(crate) fn peer(&self) -> &Peer {
        &self.client.peer
    }

    /// Counts one request. As many as the limit of a second can be made at once, and from then on
    /// as they come back.
    pub(crate) fn request(&self) -> Result<(), Failure> {
        let most = self.clients.limits.requests_per_second;
        let (left, since) = self.client.credit.get();
        let now = Instant::now();
        let earned = now.duration_since(since).as_secs_f64() * f64::from(most);
        let left = (left + earned).min(f64::from(most));
        if left < 1.0 {
            self.client.credit.set((left, now));
            self.client.log("it makes too many requests");
            return Err(Failure::new(
                "too-many-requests",
                format!("process {} makes more than {most} requests a second", self.peer().pid),
                "wait between requests, or raise `requests_per_second` in the configuration",
            ));
        }
        self.client.credit.set((left - 1.0, now));
        Ok(())
    }
}

impl Client {
    /// A line, unless there was one just now.
    fn log(&self, why: &str) {
        let now = Instant::now();
        if self.logged.get().is_none_or(|last| now.duration_since(last) >= LOG_AGAIN) {
            self.logged.set(Some(now));
            warn!(uid = self.peer.uid, pid = self.peer.pid; "a client was refused: {why}");
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let Clients { connections, users, clients, .. } = &*self.clients;
        let Client { peer, connections: own, .. } = &*self.client;
        connections.set(connections.get() - 1);
        own.set(own.get() - 1);
        if own.get() == 0 {
            clients.borrow_mut().remove(&(peer.uid, peer.pid));
        }
        let mut users = users.borrow_mut();
        if let Some(count) = users.get_mut(&peer.uid) {
            *count -= 1;
            if *count == 0 {
                users.remove(&peer.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(uid: u32, pid: u32, gids: &[u32]) -> Peer {
        Peer { pid, uid, gids: gids.to_vec() }
    }

    const NOBODY: u32 = 65_534;

    #[test]
    fn root_and_the_daemons_user_may_always_and_others_by_user_or_group() {
        let allowed = Allowed { users: vec![1000], groups: vec![50] };
        assert!(allowed.allows(&peer(0, 1, &[0])));
        assert!(allowed.allows(&peer(Uid::effective().as_raw(), 1, &[])));
        assert!(allowed.allows(&peer(1000, 1, &[1000])));
        assert!(allowed.allows(&peer(NOBODY, 1, &[NOBODY, 50])));
        assert!(!allowed.allows(&peer(NOBODY, 1, &[NOBODY, 1000])));
        assert!(!Allowed::default().allows(&peer(NOBODY, 1, &[0])));
    }

    #[test]
    fn a_refusal_names_the_user_and_what_it_wanted() {
        let none = Allowed::default();
        let refused = none.check_open(&peer(NOBODY, 7, &[5]), "edu0").unwrap_err();
        assert_eq!(refused.code, "access-denied");
        assert_eq!(refused.message, "user 65534 with groups [5] may not open service \"edu0\"");
        let refused = none.check_admin(&peer(NOBODY, 7, &[5]), "Bind").unwrap_err();
        assert_eq!(refused.code, "admin-only");
    }

    #[test]
    fn a_process_that_connects_too_often_is_refused_and_others_are_not() {
        let clients = Clients::new(Limits { connections_per_client: 2, ..Limits::default() });
        let connect = |uid, pid| clients.connect(peer(uid, pid, &[]));
        let first = connect(NOBODY, 1).unwrap();
        let _second = connect(NOBODY, 1).unwrap();
        let refused = connect(NOBODY, 1).unwrap_err();
        assert_eq!(refused.code, "too-many-connections");
        assert!(refused.message.contains("process 1 has 2"), "{refused}");
        let _other = connect(NOBODY, 2).unwrap();
        drop(first);
        connect(NOBODY, 1).unwrap();
    }

    #[test]
    fn a_user_of_many_processes_leaves_connections_for_others() {
        let clients = Clients::new(Limits::default());
        let connect = |uid, pid| clients.connect(peer(uid, pid, &[]));
        let all: Vec<_> =
            (0..MOST_OF_ONE_USER as u32).map(|pid| connect(NOBODY, pid).unwrap()).collect();
        let refused = connect(NOBODY, 1000).unwrap_err();
        assert!(refused.message.contains("user 65534 has 96"), "{refused}");
        let _other = connect(NOBODY - 1, 1).unwrap();
        drop(all);
        let _again = connect(NOBODY, 1000).unwrap();
        assert_eq!(clients.users.borrow().len(), 2);
    }

    #[test]
    fn requests_beyond_the_rate_are_refused_for_that_process_on_all_its_connections() {
        let clients = Clients::new(Limits { requests_per_second: 3, ..Limits::default() });
        let one = clients.connect(peer(NOBODY, 1, &[])).unwrap();
        let two = clients.connect(peer(NOBODY, 1, &[])).unwrap();
        // Far ahead, so that nothing is earned meanwhile.
        let later = Instant::now() + Duration::from_secs(3600);
        one.client.credit.set((2.0, later));
        one.request().unwrap();
        two.request().unwrap();
        for connection in [&one, &two] {
            connection.client.credit.set((connection.client.credit.get().0, later));
            assert_eq!(connection.request().unwrap_err().code, "too-many-requests");
        }
        clients.connect(peer(NOBODY, 2, &[])).unwrap().request().unwrap();
    }
}
