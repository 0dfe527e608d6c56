//! Users and groups, by name or by number.

use nix::unistd::{Group, User};
use serde::Deserialize;
use toml::Spanned;

use super::ConfigError;
use super::source::Source;

/// A user or a group.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a name or a number")]
pub(super) enum NameOrNumber {
    Number(u32),
    Name(String),
}

impl Source<'_> {
    pub(super) fn users(&self, users: Vec<Spanned<NameOrNumber>>) -> Result<Vec<u32>, ConfigError> {
        users.into_iter().map(|user| Ok(self.user_and_group(user)?.0)).collect()
    }

    /// A user, and its own group: of a number that has no name, the same number.
    pub(super) fn user_and_group(
        &self,
        user: Spanned<NameOrNumber>,
    ) -> Result<(u32, u32), ConfigError> {
        let line = self.line(&user.span());
        match user.into_inner() {
            NameOrNumber::Number(uid) => {
                let known = User::from_uid(uid.into()).ok().flatten();
                Ok((uid, known.map_or(uid, |user| user.gid.as_raw())))
            }
            NameOrNumber::Name(name) => match User::from_name(&name) {
                Ok(Some(user)) => Ok((user.uid.as_raw(), user.gid.as_raw())),
                _ => Err(self.unknown("user", &name, line)),
            },
        }
    }

    pub(super) fn groups(
        &self,
        groups: Vec<Spanned<NameOrNumber>>,
    ) -> Result<Vec<u32>, ConfigError> {
        let number = |group: Spanned<NameOrNumber>| {
            let line = self.line(&group.span());
            match group.into_inner() {
                NameOrNumber::Number(gid) => Ok(gid),
                NameOrNumber::Name(name) => match Group::from_name(&name) {
                    Ok(Some(group)) => Ok(group.gid.as_raw()),
                    _ => Err(self.unknown("group", &name, line)),
                },
            }
        };
        groups.into_iter().map(number).collect()
    }

    fn unknown(&self, kind: &str, name: &str, line: usize) -> ConfigError {
        let message = format!("this machine has no {kind} {name:?}");
        self.error(line, message, &format!("create the {kind}, or give its number"))
    }
}

#[cfg(test)]
mod tests {
    use crate::access::Allowed;
    use crate::config::tests::{complaint, parse};

    #[test]
    fn who_may_open_a_device_is_given_by_names_and_numbers() {
        let device = "[[device]]\naddress = \"01:00.0\"\n";
        let config = parse(&format!("{device}allow_users = [\"root\", 1000]\n")).unwrap();
        let allowed = Allowed { users: vec![0, 1000], groups: vec![] };
        assert_eq!(config.devices[0].clients, Some(allowed));
        assert_eq!(parse(device).unwrap().devices[0].clients, None);
        assert_eq!(
            complaint(&format!("{device}allow_groups = [\"no-such-group\"]\n")),
            "iohost.toml:3: this machine has no group \"no-such-group\"\n  next: create the \
             group, or give its number"
        );
        assert_eq!(
            complaint("admin_users = [\n  \"no-such-user\"]\n"),
            "iohost.toml:2: this machine has no user \"no-such-user\"\n  next: create the user, \
             or give its number"
        );
    }
}
