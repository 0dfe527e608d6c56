//! PCI devices as sysfs shows them, and binding them to a kernel driver.
