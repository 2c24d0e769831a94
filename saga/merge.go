package saga

import (
	"fmt"
	"reflect"
)

// merge takes over into current what a step has changed: the difference between
// base, with which the step began, and changed. All three are pointers to the
// same type and share no memory. Structs are merged by field and maps by key;
// anything else is one value.
func merge(base, changed, current any) error {
	return mergeValue("the state", reflect.ValueOf(base).Elem(), reflect.ValueOf(changed).Elem(), reflect.ValueOf(current).Elem())
}

func mergeValue(what string, base, changed, current reflect.Value) error {
	switch base.Kind() {
	case reflect.Struct:
		for i := range base.NumField() {
			f := base.Type().Field(i)
			if !f.IsExported() {
				continue // not stored either, by JSON
			}
			if err := mergeValue("field "+f.Name, base.Field(i), changed.Field(i), current.Field(i)); err != nil {
				return err
			}
		}
		return nil
	case reflect.Map:
		return mergeMap(what, base, changed, current)
	}
	b, c, now := base.Interface(), changed.Interface(), current.Interface()
	if reflect.DeepEqual(b, c) || reflect.DeepEqual(c, now) {
		return nil
	}
	if !reflect.DeepEqual(b, now) {
		return fmt.Errorf("saga: %s was changed by two steps that ran at the same time", what)
	}
	current.Set(changed)
	return nil
}

func mergeMap(what string, base, changed, current reflect.Value) error {
	keys := make(map[any]reflect.Value)
	for _, m := range []reflect.Value{base, changed} {
		for _, k := range m.MapKeys() {
			keys[k.Interface()] = k
		}
	}
	at := func(m, k reflect.Value) any {
		if v := m.MapIndex(k); v.IsValid() {
			return v.Interface()
		}
		return absent{}
	}
	for _, k := range keys {
		b, c, now := at(base, k), at(changed, k), at(current, k)
		switch {
		case reflect.DeepEqual(b, c) || reflect.DeepEqual(c, now):
		case !reflect.DeepEqual(b, now):
			return fmt.Errorf("saga: %s, key %v, was changed by two steps that ran at the same time", what, k)
		default:
			if current.IsNil() {
				current.Set(reflect.MakeMap(current.Type()))
			}
			current.SetMapIndex(k, changed.MapIndex(k)) // the zero Value deletes
		}
	}
	return nil
}

type absent struct{}
