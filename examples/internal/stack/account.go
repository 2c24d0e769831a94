package stack

import (
	"errors"
	"os"
	"os/user"
	"strconv"
	"syscall"
)

// An account is a user that servers run as which refuse to run as root.
type account struct{ uid, gid int }

// unprivileged returns nil for an ordinary user, and for root the account that
// servers shall use.
func unprivileged() (*account, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.Atoi(u.Uid)
		gid, err2 := strconv.Atoi(u.Gid)
		if err1 == nil && err2 == nil {
			return &account{uid, gid}, nil
		}
	}
	return nil, errors.New("running as root, and there is neither a user postgres nor nobody to run the server as")
}

func (a *account) apply(attr *syscall.SysProcAttr) {
	attr.Credential = &syscall.Credential{Uid: uint32(a.uid), Gid: uint32(a.gid)}
}
