-- KEYS: counter, keys; ARGV: owner, ttl in ms, waiting ("1" or "")
-- A key that is held is the string of token, separator and owner; the separator
-- is a space, or "+" where somebody waits, so that the release is to be told of.
-- Returns the token, or {the number of a held key, for how many ms}.
local again = true
local token
for i = 2, #KEYS do
	local v = redis.call('GET', KEYS[i])
	if v then
		local p = string.find(v, '[ +]')
		if string.sub(v, p + 1) ~= ARGV[1] then
			if ARGV[3] == '1' and string.sub(v, p, p) == ' ' then
				redis.call('SET', KEYS[i], string.sub(v, 1, p - 1) .. '+' .. string.sub(v, p + 1), 'KEEPTTL')
			end
			return {i - 1, redis.call('PTTL', KEYS[i])}
		end
		token = string.sub(v, 1, p - 1)
	else
		again = false
	end
end
if again then
	return tonumber(token)
end
token = redis.call('INCR', KEYS[1])
if token < 1000000000000000 then
	-- A new counter begins at the time in µs, ahead of whatever one before it has
	-- counted up to; and ends after a month, by which time is ahead of this one.
	local t = redis.call('TIME')
	token = t[1] * 1000000 + t[2]
	redis.call('SET', KEYS[1], string.format('%d', token), 'PX', 2592000000)
end
local v = string.format('%d %s', token, ARGV[1])
for i = 2, #KEYS do
	redis.call('SET', KEYS[i], v, 'PX', ARGV[2])
end
return token
