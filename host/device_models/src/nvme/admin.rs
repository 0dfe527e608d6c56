//! Admin commands (section 5).

use super::command::{Command, Status};
use super::queues::{CompletionQueue, SubmissionQueue};
use super::{EVENT_REQUESTS, Namespace, Nvme, Shadow, data, identify};
use crate::model::Bus;

const BROADCAST: u32 = u32::MAX;

impl Nvme {
    pub(super) fn execute_admin(&mut self, bus: &mut Bus<'_>, command: Command) {
        if self.faults.swallow_admin > 0 {
            self.faults.swallow_admin -= 1;
            return;
        }
        let faults = self.faults.admin_status.iter();
        let fault = faults.clone().find(|(opcode, _)| *opcode == command.opcode);
        let result = match fault {
            Some((_, status)) => Err(Status::from_bits(*status)),
            None => command.check_flags(false).and_then(|()| self.admin(bus, &command)),
        };
        match result {
            Ok(None) => {}
            Ok(Some(result)) => self.complete(bus, 0, command.id, Ok(result)),
            Err(status) => self.complete(bus, 0, command.id, Err(status)),
        }
    }

    /// What the command gives back; nothing for one that is completed later.
    fn admin(&mut self, bus: &mut Bus<'_>, command: &Command) -> Result<Option<u32>, Status> {
        match command.opcode {
            0x00 => self.delete_submission_queue(bus, command),
            0x01 => self.create_submission_queue(command),
            0x02 => self.get_log_page(bus, command),
            0x04 => self.delete_completion_queue(command),
            0x05 => self.create_completion_queue(command),
            0x06 => self.identify(bus, command),
            0x08 => self.abort(bus, command),
            0x09 => self.set_features(command),
            0x0a => self.get_features(bus, command),
            0x0c => return self.request_event(bus, command),
            0x7c if self.options.shadow_doorbells => self.configure_shadow(bus, command),
            _ => Err(Status::INVALID_OPCODE),
        }
        .map(Some)
    }

    /// Section 5.3. A queue is physically contiguous (`CAP.CQR`).
    fn create_completion_queue(&mut self, command: &Command) -> Result<u32, Status> {
        let (id, size) = self.new_queue(command)?;
        let flags = command.dword(11);
        let vector = (flags >> 16) as u16;
        let vectors = self.options.msi_x_vectors.max(self.options.msi_vectors.into()).max(1);
        if self.completion.contains_key(&id) {
            return Err(Status::INVALID_QUEUE_ID);
        }
        let interrupts = flags & 2 != 0;
        if interrupts && vector >= vectors {
            return Err(Status::INVALID_VECTOR);
        }
        let queue = CompletionQueue::new(command.data.0, size, interrupts.then_some(vector));
        self.completion.insert(id, queue);
        Ok(0)
    }

    /// Section 5.4.
    fn create_submission_queue(&mut self, command: &Command) -> Result<u32, Status> {
        let (id, size) = self.new_queue(command)?;
        let completion = (command.dword(11) >> 16) as u16;
        if completion == 0 || !self.completion.contains_key(&completion) {
            return Err(Status::COMPLETION_QUEUE_INVALID);
        }
        if self.submission.contains_key(&id) {
            return Err(Status::INVALID_QUEUE_ID);
        }
        self.submission.insert(id, SubmissionQueue::new(command.data.0, size, completion));
        Ok(0)
    }

    /// Id and size of a queue that can be made.
    fn new_queue(&self, command: &Command) -> Result<(u16, u32), Status> {
        let (id, size) = (command.dword(10) as u16, (command.dword(10) >> 16) + 1);
        if id == 0 || id > self.options.io_queues {
            return Err(Status::INVALID_QUEUE_ID);
        }
        if size < 2 || size > u32::from(self.options.queue_entries) {
            return Err(Status::INVALID_QUEUE_SIZE);
        }
        if command.dword(11) & 1 == 0 || !self.registers.entry_sizes_are_set() {
            return Err(Status::INVALID_FIELD);
        }
        if !command.data.0.is_multiple_of(self.registers.page()) {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        Ok((id, size))
    }

    /// Section 5.6: commands that are not executed yet are aborted, implicitly.
    fn delete_submission_queue(
        &mut self,
        bus: &mut Bus<'_>,
        command: &Command,
    ) -> Result<u32, Status> {
        let id = command.dword(10) as u16;
        if id == 0 || !self.submission.contains_key(&id) {
            return Err(Status::INVALID_QUEUE_ID);
        }
        self.process(bus, id);
        self.held.retain(|(queue, _)| *queue != id);
        self.submission.remove(&id);
        Ok(0)
    }

    /// Section 5.5.
    fn delete_completion_queue(&mut self, command: &Command) -> Result<u32, Status> {
        let id = command.dword(10) as u16;
        if id == 0 || !self.completion.contains_key(&id) {
            return Err(Status::INVALID_QUEUE_ID);
        }
        if self.submission.values().any(|queue| queue.completion_queue == id) {
            return Err(Status::INVALID_QUEUE_DELETION);
        }
        self.completion.remove(&id);
        self.registers.set_line_cause(id, false);
        Ok(0)
    }

    /// Section 5.15.
    fn identify(&mut self, bus: &mut Bus<'_>, command: &Command) -> Result<u32, Status> {
        let after = command.nsid;
        let mut data = match command.dword(10) as u8 {
            0x00 if command.nsid == BROADCAST => {
                // What all namespaces have in common, which is next to nothing.
                vec![0; identify::SIZE]
            }
            0x00 => match self.valid_namespace(command.nsid)? {
                Some(namespace) => identify::namespace(namespace, command.nsid),
                // One that is not active has a structure of zeros.
                None => vec![0; identify::SIZE],
            },
            0x01 => identify::controller(&self.options, self.namespace_count()),
            0x02 if after >= u32::MAX - 1 => return Err(Status::INVALID_NAMESPACE),
            0x02 => match &self.faults.active_list {
                Some(list) => identify::list(list.iter().copied()),
                None => identify::list(self.namespaces.keys().copied().filter(|id| *id > after)),
            },
            0x03 => match self.valid_namespace(command.nsid)? {
                Some(_) => identify::descriptors(command.nsid),
                None => return Err(Status::INVALID_NAMESPACE),
            },
            _ => return Err(Status::INVALID_FIELD),
        };
        let patches = match command.dword(10) as u8 {
            0x00 => &self.faults.namespace_bytes[..],
            0x01 => &self.faults.controller_bytes[..],
            _ => &[],
        };
        for (at, bytes) in patches {
            data[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        let len = identify::SIZE as u64;
        let runs = data::resolve(bus, self.registers.page(), command, len)?;
        data::write(bus, &runs, &data);
        Ok(0)
    }

    /// `NN`: the largest number that a namespace can have; some room is left for new ones.
    fn namespace_count(&self) -> u32 {
        self.namespaces.keys().last().copied().unwrap_or(0).max(16)
    }

    fn valid_namespace(&self, nsid: u32) -> Result<Option<&Namespace>, Status> {
        match nsid {
            0 => Err(Status::INVALID_NAMESPACE),
            nsid if nsid > self.namespace_count() => Err(Status::INVALID_NAMESPACE),
            nsid => Ok(self.namespaces.get(&nsid)),
        }
    }

    /// Section 5.1. Bit 0 of the result: 0 when the command was aborted.
    fn abort(&mut self, bus: &mut Bus<'_>, command: &Command) -> Result<u32, Status> {
        let (queue, id) = (command.dword(10) as u16, (command.dword(10) >> 16) as u16);
        let is_it = |held: &(u16, Command)| held.0 == queue && held.1.id == id;
        let found = self.held.iter().position(is_it).filter(|_| !self.faults.ignores_abort);
        let Some(place) = found else { return Ok(1) };
        self.held.remove(place);
        self.complete(bus, queue, id, Err(Status::ABORT_REQUESTED));
        Ok(0)
    }

    /// Section 5.21.
    fn set_features(&mut self, command: &Command) -> Result<u32, Status> {
        let feature = command.dword(10) as u8;
        let value = command.dword(11);
        if command.dword(10) >> 31 == 1 {
            return Err(Status::INVALID_FIELD); // nothing can be saved (ONCS bit 4)
        }
        match feature {
            0x07 => {
                let (submission, completion) = (value & 0xffff, value >> 16);
                if submission == 0xffff || completion == 0xffff {
                    return Err(Status::INVALID_FIELD);
                }
                let most = u32::from(self.options.io_queues) - 1;
                let granted = submission.min(most) | completion.min(most) << 16;
                let granted = self.faults.granted_queues.unwrap_or(granted);
                self.features.insert((feature, 0), granted);
                Ok(granted)
            }
            0x01 | 0x02 | 0x04 | 0x05 | 0x06 | 0x08..=0x0b => {
                self.features.insert((feature, 0), value);
                Ok(0)
            }
            _ => Err(Status::INVALID_FIELD),
        }
    }

    /// Section 5.13. Select 0 is the current value, 1 the default, 3 what can be done to it.
    fn get_features(&mut self, _bus: &mut Bus<'_>, command: &Command) -> Result<u32, Status> {
        let feature = command.dword(10) as u8;
        let most = u32::from(self.options.io_queues) - 1;
        let default = match feature {
            0x07 => most | most << 16,
            0x04 => 343,
            0x06 => 1,
            0x09 => command.dword(11) & 0xffff,
            0x01 | 0x02 | 0x05 | 0x08 | 0x0a | 0x0b => 0,
            _ => return Err(Status::INVALID_FIELD),
        };
        match command.dword(10) >> 8 & 7 {
            0 => Ok(self.features.get(&(feature, 0)).copied().unwrap_or(default)),
            1 => Ok(default),
            3 => Ok(1 << 2), // changeable
            _ => Err(Status::INVALID_FIELD),
        }
    }

    /// Section 5.2.
    fn request_event(
        &mut self,
        bus: &mut Bus<'_>,
        command: &Command,
    ) -> Result<Option<u32>, Status> {
        if self.event_requests.len() == EVENT_REQUESTS {
            return Err(Status::EVENT_REQUEST_LIMIT);
        }
        self.event_requests.push_back(command.id);
        self.tell_of_namespaces(bus);
        Ok(None)
    }

    pub(super) fn namespace_changed(&mut self, bus: &mut Bus<'_>, nsid: u32) {
        self.changed_namespaces.push(nsid);
        self.tell_of_namespaces(bus);
    }

    /// A notice (type 2), namespace attribute changed (0), log page 04h: once, until that is read.
    fn tell_of_namespaces(&mut self, bus: &mut Bus<'_>) {
        const CHANGED: u32 = 2 | 0x04 << 16;
        let is_wanted = self.features.get(&(0x0b, 0)).is_some_and(|events| events >> 8 & 1 == 1);
        if is_wanted
            && !self.event_is_masked
            && !self.changed_namespaces.is_empty()
            && let Some(id) = self.event_requests.pop_front()
        {
            self.event_is_masked = true;
            self.complete(bus, 0, id, Ok(CHANGED));
        }
    }

    /// Section 5.7.
    fn configure_shadow(&mut self, bus: &mut Bus<'_>, command: &Command) -> Result<u32, Status> {
        let (doorbells, event_indices) = command.data;
        let page = self.registers.page();
        if !doorbells.is_multiple_of(page) || !event_indices.is_multiple_of(page) {
            return Err(Status::INVALID_FIELD);
        }
        self.shadow = Some(Shadow { doorbells, event_indices });
        self.process_all(bus);
        Ok(0)
    }
}
