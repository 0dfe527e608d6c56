# Functions for tests of iohost doctor. Source it: . /share/tests/guest/doctor.sh
. /share/tests/guest/check.sh

# examine ADDRESS: has doctor look, in the way of `doctor_as` (a command that gets the command line),
# and keeps what it says in /tmp/doctor. Its exit status has to say whether something blocks.
doctor_as=
examine() {
    local status=0 blocks=0
    $doctor_as iohost doctor "$1" >/tmp/doctor || status=$?
    grep -q '^  blocks [a-z-]*: ' /tmp/doctor && blocks=1
    [ $status -eq $blocks ] || fail "exit status $status, and doctor says: $(cat /tmp/doctor)"
}

# finding CODE: what doctor said about it, if it did.
finding() {
    grep "^  [a-z]* $1: " /tmp/doctor
}

# command_of CODE: the command that doctor said removes it.
command_of() {
    sed -n "/^  [a-z]* $1: /,/^ \{0,2\}[a-z0-9]/s/^    \\$ //p" /tmp/doctor
}

# expect_finding CODE WORDS: doctor has found CODE, and says WORDS of it.
expect_finding() {
    finding "$1" || fail "no $1 among what doctor says: $(cat /tmp/doctor)"
    finding "$1" | grep -q -F -e "$2" || fail "no '$2' in that"
    iohost explain "$1" | grep -q "^$1 (" || fail "no explanation of $1"
}

expect_no_finding() {
    ! finding "$1" || fail "$1 is still there: $(cat /tmp/doctor)"
}

# expect_healthy CODE ADDRESS: the defect is not there before it is prepared.
expect_healthy() {
    echo "--- $1"
    examine "$2"
    expect_no_finding "$1"
}

# cure CODE ADDRESS WORDS [SHELL...]: doctor finds CODE with WORDS; its command, run by SHELL (sh -c),
# removes it.
cure() {
    local code=$1 address=$2 words=$3 command
    shift 3
    [ $# -gt 0 ] || set -- sh -c
    examine "$address"
    expect_finding "$code" "$words"
    command=$(command_of "$code")
    [ -n "$command" ] || fail "no command for $code: $(cat /tmp/doctor)"
    echo "    $ $command"
    "$@" "$command" || fail "the command ended with status $?"
    is_cured() { examine "$address" && ! finding "$code"; }
    await "$code to be gone after its command" is_cured
    echo "cured       $code"
}
