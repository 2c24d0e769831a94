package lockredis_test

import (
	"testing"

	"github.com/ashlar-go/ashlar/internal/redistest"
	"github.com/ashlar-go/ashlar/lock"
	"github.com/ashlar-go/ashlar/lock/lockredis"
	"github.com/ashlar-go/ashlar/lock/locktest"
)

func open(t *testing.T) lock.Store {
	client := redistest.Client(t)
	return lockredis.New(client, &lockredis.Options{Prefix: redistest.Prefix(t, client)})
}

func TestStore(t *testing.T) { locktest.TestStore(t, open) }
