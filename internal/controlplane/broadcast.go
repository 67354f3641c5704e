package controlplane

import (
	"sync"

	"k8s.io/client-go/tools/cache"
)

// broadcast wakes all who wait.
type broadcast struct {
	mu sync.Mutex
	ch chan struct{}
}

func newBroadcast() *broadcast { return &broadcast{ch: make(chan struct{})} }

// next is closed by the first send after this call.
func (b *broadcast) next() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.ch
}

func (b *broadcast) send() {
	b.mu.Lock()
	defer b.mu.Unlock()
	close(b.ch)
	b.ch = make(chan struct{})
}

// onChange sends after each change in the cache of informer.
func (b *broadcast) onChange(informer cache.SharedIndexInformer) error {
	_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { b.send() },
		UpdateFunc: func(any, any) { b.send() },
		DeleteFunc: func(any) { b.send() },
	})
	return err
}
